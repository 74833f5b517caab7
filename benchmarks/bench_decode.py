# SPDX-License-Identifier: Apache-2.0
"""What retrieval costs an answer: decoding with policies that select as they go, against sinks and a window alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from harness import Report, Timing, check, cpu, options, wall
from kvstore.codec import Profile
from kvstore.engines.anatomy import decoder_of, rotation_of, spec_of, trained_tokens_of
from kvstore.engines.loading import LanguageModel
from kvstore.engines.transformers import TierCache, attach
from kvstore.layout import BlockLayout
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.registry import policy_named
from kvstore.session.session import Session
from kvstore.session.stream_memory import StreamMemory
from kvstore.session.view import SessionConfig
from kvstore.store import Access, Durability, Store, StreamHeader
from kvstore.video.model import load
from real_kv import BLOCK_TOKENS, CHUNK_TOKENS, text_ids

BASELINE = "streaming_llm"
CONTEXT_TOKENS = 4096
PROMPT_TOKENS = 16
SINK_TOKENS, WINDOW_TOKENS = 16, 1024
PIECE_TOKENS = 8
"""Tokens that are timed together: a policy that selects now and then has done so in each piece."""
PIECES = 4
"""Of an answer."""


CLOCKS = {"wall": (wall, "tokens/s"), "cpu": (cpu, "tokens/cpu-s")}


def read_clocks() -> list[float]:
    """Seconds by all clocks."""
    return [clock() for clock, _ in CLOCKS.values()]


def since(began: list[float]) -> Tensor:
    """Seconds by all clocks; what makes a tensor of them is not among them."""
    return torch.tensor([ended - each for ended, each in zip(read_clocks(), began, strict=True)], dtype=torch.float64)


@dataclass(slots=True)
class Run:
    """What one policy took, in seconds by each of `CLOCKS`.

    Args:
        session: over the stream, with the policy.
        pieces: of decoding one piece, by piece.
        firsts: to the first token, by question.
        selects: of them, those that went to selecting, all layers together.
        hit_rates: by question.
    """

    session: Session
    pieces: list[Tensor] = field(default_factory=list)
    firsts: list[Tensor] = field(default_factory=list)
    selects: list[Tensor] = field(default_factory=list)
    hit_rates: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """An answer that is being decoded: its cache and newest token."""

    cache: TierCache
    token: Tensor


@contextmanager
def stored(
    language_model: LanguageModel, folder: Path | None, ids: list[int]
) -> Iterator[Callable[[Policy, int], Session]]:
    """A stream of these tokens; makes sessions that ask it."""
    model, spec = language_model.model, spec_of(language_model.model)
    layout, rotate = BlockLayout(spec, BLOCK_TOKENS), rotation_of(model)

    def session_over(store: Store, header: StreamHeader, policy: Policy, budget_tokens: int) -> Session:
        config = SessionConfig(
            policy=policy,
            window_tokens=WINDOW_TOKENS,
            sink_tokens=SINK_TOKENS,
            budget_tokens=budget_tokens,
            trained_tokens=trained_tokens_of(model),
        )
        return Session(store, header, config, rotate, language_model.device)

    with TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "store"
        with Store.open(
            path, access=Access.WRITE, layout=layout, host_nbytes=256 << 20, durability=Durability.COMMIT
        ) as store:
            config = SessionConfig(policy_named(BASELINE), WINDOW_TOKENS, SINK_TOKENS)
            header = StreamHeader("bench", spec, BLOCK_TOKENS, Profile.LOSSLESS, config.prefill, {}, 0.0)
            header = store.create_stream(header).header
            with attach(model, session_over(store, header, config.policy, 0)) as attached:
                for first in range(0, len(ids), CHUNK_TOKENS):
                    chunk = torch.tensor([ids[first : first + CHUNK_TOKENS]], device=language_model.device)
                    decoder_of(model)(input_ids=chunk, past_key_values=attached.cache(), use_cache=True)
                attached.session.commit(partial=True)
                attached.session.flush()
        with Store.open(path, access=Access.READ, layout=layout, host_nbytes=1 << 30) as store:
            yield lambda policy, budget_tokens: session_over(store, header, policy, budget_tokens)


@contextmanager
def watched(session: Session) -> Iterator[list[Tensor]]:
    """Seconds that selecting takes inside, layer by layer."""
    taken: list[Tensor] = []
    policy = session.view.policy
    search: Any = session.view.search(policy) if policy.retrieves else None
    if not isinstance(search, StreamMemory):
        yield taken
        return
    select = search.select

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = read_clocks()
        found = select(*args, **kwargs)
        taken.append(since(began))
        return found

    search.select = timed  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        del search.select


def ask(model: Any, run: Run, prompt: Tensor, passes: int) -> Answer:
    """Ask, and time the first token; of two passes, the first is over the bare question, and selects."""
    with attach(model, run.session) as attached, watched(run.session) as taken:
        began = read_clocks()
        cache = attached.question(prompt if passes == 2 else None)
        logits = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits
        run.firsts.append(since(began))
    run.selects.append(sum(taken, torch.zeros(len(CLOCKS), dtype=torch.float64)))
    return Answer(cache, logits[:, -1:].argmax(-1))


def step(model: Any, run: Run, answer: Answer) -> Tensor:
    """Decode one token; seconds by all clocks."""
    with attach(model, run.session):
        began = read_clocks()
        logits = model(input_ids=answer.token, past_key_values=answer.cache, logits_to_keep=1).logits
        answer.token = logits[:, -1:].argmax(-1)
        return since(began)


def measure(model: Any, runs: dict[str, Run], prompt: Tensor, num_questions: int, passes: int) -> None:
    """Ask and decode with all policies in turns, token by token, so that what disturbs one disturbs all."""
    for number in range(num_questions + 1):
        answers = {name: ask(model, run, prompt, passes) for name, run in runs.items()}
        for _ in range(PIECES):
            taken = {name: torch.zeros(len(CLOCKS), dtype=torch.float64) for name in runs}
            for _ in range(PIECE_TOKENS):
                for name, run in runs.items():
                    taken[name] += step(model, run, answers[name])
            for name, run in runs.items():
                run.pieces.append(taken[name])
        for name, run in runs.items():
            branch = answers[name].cache.branch
            check(branch is not None, "a question branches off")
            assert branch is not None, "just checked"
            run.hit_rates.append(branch.recall.speculation.hit_rate)
        if number == 0:  # makes the index and brings the blocks
            for run in runs.values():
                for warm in (run.pieces, run.firsts, run.selects, run.hit_rates):
                    warm.clear()


def report_all(report: Report, runs: dict[str, Run], **case: Any) -> None:
    """Rows of all policies against the baseline, and of selection against its own first token."""
    base = runs[BASELINE]
    for name, run in runs.items():
        if name == BASELINE:
            continue
        for number, (clock, (_, unit)) in enumerate(CLOCKS.items()):
            pieces, firsts, selects = (timing(each, number) for each in (run.pieces, run.firsts, run.selects))
            against = (BASELINE, timing(base.pieces, number))
            report.rate("decode", PIECE_TOKENS, unit, (name, pieces), against, clock=clock, **case)
            against = (BASELINE, timing(base.firsts, number))
            report.latency("first_token", (name, firsts), against, clock=clock, **case)
            share, whole = ("selection", selects), ("first token", firsts)
            report.latency("selection", share, whole, clock=clock, policy=name, **case)
        rate = sum(run.hit_rates) / len(run.hit_rates)
        report.value("hit_rate", "share", (name, rate), ("every unit", 1.0), **case)


def timing(taken: list[Tensor], clock: int) -> Timing:
    """Sum up what one clock says."""
    return Timing.of([float(each[clock]) for each in taken])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Let the caller choose a model, policies and the budget."""
    parser.add_argument("--model", type=Path, help="model folder or GGUF file; the default is SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, help="where the scratch store is written; default: the system's")
    parser.add_argument("--policies", nargs="+", default=["auto"], metavar="NAME", help="default: auto")
    parser.add_argument(
        "--passes", type=int, choices=(1, 2), default=2, help="2: the bare question is asked before the prompt"
    )
    parser.add_argument("--budget", type=int, nargs="+", default=[256], metavar="TOKENS", help="default: 256")


def run_all(
    report: Report,
    language_model: LanguageModel,
    settings: argparse.Namespace,
    *,
    num_tokens: int,
    num_questions: int,
) -> None:
    """Store a text and ask it with every budget."""
    ids = text_ids(language_model, num_tokens + PROMPT_TOKENS)
    prompt = torch.tensor([ids[num_tokens:]], device=language_model.device)
    with torch.inference_mode(), stored(language_model, settings.folder, ids[:num_tokens]) as make_session:
        for budget in settings.budget:
            runs = {name: Run(make_session(policy_named(name), budget)) for name in (BASELINE, *settings.policies)}
            measure(language_model.model, runs, prompt, num_questions, settings.passes)
            report_all(
                report, runs, passes=settings.passes, context=num_tokens, budget=budget, model=language_model.path.stem
            )


def main() -> None:
    """Measure on a real model."""
    settings = options("decode", __doc__, add_options)
    report = Report(settings)
    num_questions = 4 if settings.quick else 12
    run_all(report, load(settings.model), settings, num_tokens=CONTEXT_TOKENS, num_questions=num_questions)
    report.write()


if __name__ == "__main__":
    main()
