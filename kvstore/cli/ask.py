# SPDX-License-Identifier: Apache-2.0
"""`kvstore ask`: answers a question from a stream and cites where the answer comes from."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from kvstore.cli import arguments, text
from kvstore.errors import CapacityError
from kvstore.video.prompt import stamp

if TYPE_CHECKING:
    from kvstore.tiers.manifest import Manifest
    from kvstore.video.ask import Answer

_MAX_NAMED = 8


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its arguments."""
    parser = commands.add_parser(
        "ask",
        help="ask a stream a question",
        description="Answer a question from a stream, complete or still being read, and cite the stretches of video.",
    )
    parser.add_argument("question", type=arguments.text, metavar="QUESTION", help="what to ask")
    arguments.add_store(parser, stream=True)
    arguments.add_model(parser)
    parser.add_argument("--policy", default="auto", metavar="NAME", help="policy to retrieve by")
    parser.add_argument(
        "--budget",
        type=arguments.count,
        default=128,
        metavar="TOKENS",
        help="most tokens of the stream to bring back (default 128)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask; see `kvstore.video.ask`."""
    from kvstore.cli.stored import find_stream
    from kvstore.retrieval.registry import policy_named

    # Before the seconds that loading a model takes.
    policy_named(options.policy)
    manifest = find_stream(options.store, options.stream)
    from kvstore.video.ask import Asker
    from kvstore.video.model import load

    language_model = load(options.model)
    with Asker(
        options.store, options.stream, language_model, policy=options.policy, budget_tokens=options.budget
    ) as asker:
        index_s = asker.index_s
        try:
            answer = asker.ask(options.question)
        except CapacityError as error:
            raise CapacityError(
                f"a budget of {options.budget:,} tokens does not fit the device pool; ask with a smaller --budget"
            ) from error
    if not manifest.is_complete:
        print(f"kvstore: note: {_how_far(manifest)}", file=sys.stderr)
    for block in answer.damaged[:_MAX_NAMED]:
        print(f"kvstore: warning: not attended to: {text.printable(block)}", file=sys.stderr)
    if len(answer.damaged) > _MAX_NAMED:
        more = len(answer.damaged) - _MAX_NAMED
        print(f"kvstore: warning: not attended to: {more:,} more, which --json lists", file=sys.stderr)
    if options.json:
        print(json.dumps(_as_json(answer, index_s), indent=1))
    else:
        print("\n".join(_as_text(answer, index_s)))
    return 0


def _how_far(manifest: Manifest) -> str:
    from kvstore.cli.stored import read_until

    until = text.duration(read_until(manifest))
    whole = text.duration(manifest.header.source.get("duration_s"))
    return f"the stream is not complete: read until {until} of {whole}"


def _as_json(answer: Answer, index_s: float) -> dict[str, object]:
    stages = answer.stages_s
    return {
        "question": answer.question,
        "answer": answer.answer,
        "spans": [
            {"start_s": span.start_s, "end_s": span.end_s, "score": span.score, "attended": span.is_attended}
            for span in answer.spans
        ],
        "ttft_s": answer.ttft_s,
        "stages_s": {
            "retrieve": stages.retrieve,
            "load": stages.load,
            "decode": stages.decode,
            "attend": stages.attend,
        },
        "index_s": index_s,
        "bytes_read": answer.bytes_read,
        "policy": answer.policy,
        "tokens_in_stream": answer.tokens_in_stream,
        "tokens_attended": answer.tokens_attended,
        "damaged": answer.damaged,
        "num_unsearched": answer.num_unsearched,
    }


def _as_text(answer: Answer, index_s: float) -> list[str]:
    stages = answer.stages_s
    read = ", ".join(f"{tier} {text.size(nbytes)}" for tier, nbytes in answer.bytes_read.items())
    rows = [
        (f"{stamp(span.start_s)}-{stamp(span.end_s)}", "attended" if span.is_attended else "", f"{span.score:.3f}")
        for span in answer.spans
    ]
    unsearched = [f"{text.count(answer.num_unsearched, 'block')} could not be searched: damaged"]
    cited = text.table(("span", "", "score"), rows, left=2) if rows else ["no span cited"]
    return [
        text.printable(answer.answer) or "(the model says nothing)",
        "",
        *cited,
        "",
        f"first token after {answer.ttft_s:.3f} s: retrieve {stages.retrieve:.3f}, load {stages.load:.3f}, "
        f"decode {stages.decode:.3f}, attend {stages.attend:.3f}",
        f"before that, once per process: index read in {index_s:.3f} s",
        f"bytes read: {read}",
        f"attended to {answer.tokens_attended:,} of {text.count(answer.tokens_in_stream, 'token')}, "
        f"chosen by {answer.policy}",
        *(unsearched if answer.num_unsearched else []),
    ]
