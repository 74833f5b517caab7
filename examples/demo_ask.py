# SPDX-License-Identifier: Apache-2.0
"""Asks a stream every question that its recorder knows the answer to, and the same model without the stream.

A process of its own, so that nothing of the ingest is left in memory; `demo.py` starts it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from demo_passages import Encode, block_around, tokens_from
from demo_scoring import Json, is_hit, is_moment_found, mark_cold, summarise, wordings
from demo_table import heading, row, section
from kvstore.cli.progress import Progress
from kvstore.errors import KVStoreError
from kvstore.store import Access, Store
from kvstore.video.ask import Asker
from kvstore.video.model import load
from kvstore.video.prompt import PREAMBLE
from plain_model import PlainModel

_BLOCK_TOKENS = 128
_WARM_UP = "What is shown?"


def main() -> None:
    """Ask, print a table, write everything that was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--store", type=Path, required=True, help="the store")
    parser.add_argument("--stream", required=True, help="the stream")
    parser.add_argument("--truth", type=Path, required=True, help="JSON that the recorder wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    options = parser.parse_args()
    truth: Json = json.loads(options.truth.read_text())
    questions = [_question(fact) for fact in (*truth["facts"], *truth["natural"])]
    with Progress(sys.stderr) as progress:
        progress.show(None, ["loading the model"])
        language_model = load(None)
        plain = PlainModel(language_model)
        progress.show(None, ["reading the index"])
        with Asker(options.store, options.stream, language_model) as asker:
            progress.close()
            # Brings the preamble to the device and wakes the model up.
            first = asker.ask(_WARM_UP, max_new_tokens=1)
            index_s = asker.index_s
            _ask(asker, plain, language_model.encode, truth["screens"], questions)
        # The other rows are not timed. Steps of one token gain little from threads, which also wait for each other:
        # on a busy machine that takes ten times as long as one thread alone.
        torch.set_num_threads(1)
        with Asker(options.store, options.stream, language_model, policy="streaming_llm") as forgetful:
            for question in _counted(questions, "the same with recent text only", progress):
                _note(question, "streaming_llm", forgetful.ask(question["question"]).answer)
        for question in _counted(questions, "the same with nothing but the question", progress):
            _note(question, "no_context", plain.answer("", question["question"]))
        for question in _counted(questions, "the same with the true passage as text", progress):
            passage = block_around(question, truth["screens"], language_model.encode, _BLOCK_TOKENS)
            _note(question, "oracle", plain.answer(f"{passage}\n", question["question"]))
            question["oracle"]["passage"] = passage
    mark_cold(questions)
    found: Json = {
        "model": language_model.path.stem,
        "policy": first.policy,
        "index_s": index_s,
        "stream": _stream(options.store, options.stream),
        "summary": summarise(questions, first.tokens_in_stream),
        "questions": questions,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def _question(fact: Json) -> Json:
    kept = {key: fact[key] for key in ("kind", "question", "accept", "sentence")}
    return kept | {"expected": fact["answer"], "true_spans": fact["spans"]}


def _ask(asker: Asker, plain: PlainModel, encode: Encode, screens: list[Json], questions: list[Json]) -> None:
    """Ask from disk, then read as many tokens as text, by turns: what else the machine does hits both alike."""
    num_preamble = len(encode(PREAMBLE))
    print(heading())
    kind = ""
    for question in questions:
        if question["kind"] != kind:
            kind = question["kind"]
            print(section(kind))
        before = _device_read_nbytes()
        answer = asker.ask(question["question"])
        after = _device_read_nbytes()
        question["retrieval"] = answer.to_json()
        question["retrieval"]["is_hit"] = is_hit(answer.answer, wordings(question))
        question["device_nbytes"] = None if before is None or after is None else after - before
        question["is_moment_found"] = is_moment_found(question)
        start_s = answer.spans[0].start_s if answer.spans else 0.0
        context = tokens_from(start_s, screens, encode, answer.tokens_attended - num_preamble)
        num_tokens, ttft_s = plain.time_first_token(context, question["question"])
        question["prefill"] = {"num_tokens": num_tokens, "ttft_s": ttft_s}
        print(row(question), flush=True)


def _note(question: Json, source: str, answer: str) -> None:
    question[source] = {"answer": answer, "is_hit": is_hit(answer, wordings(question))}


def _counted(questions: list[Json], doing: str, progress: Progress) -> Iterator[Json]:
    for number, question in enumerate(questions):
        progress.show(number / len(questions), [doing])
        yield question
    progress.show(1.0, [doing])
    progress.close()


def _device_read_nbytes() -> int | None:
    """Bytes that this process made the kernel read from a device; None where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _stream(folder: Path, name: str) -> Json:
    with Store.open(folder, access=Access.READ) as store:
        manifest, usage = store.manifest(name), store.stats().usage
    return {
        "num_tokens": manifest.num_tokens,
        "num_blocks": len(manifest.entries),
        "profile": str(manifest.header.profile),
        "raw_nbytes": manifest.num_tokens * manifest.header.spec.token_nbytes,
        "extent_nbytes": usage.extent_used_nbytes,
        "disk_nbytes": usage.extent_used_nbytes + usage.catalogue_nbytes,
    }


if __name__ == "__main__":
    try:
        main()
    except KVStoreError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command asks again", file=sys.stderr)
        sys.exit(130)
