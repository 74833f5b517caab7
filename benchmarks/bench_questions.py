# SPDX-License-Identifier: Apache-2.0
"""The demo's questions, asked of its video by every policy, with and without a retriever of the user's own."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from asking.plot import bars
from asking.scores import Scores, table
from asking.truth import STREAM, Question, Recording, spread
from asking.word_vectors import WordVectors
from harness import Report, Timing, check, options
from kvstore.engines.loading import LanguageModel
from kvstore.retrieval.fusion import ExtraScores
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.registry import policies
from kvstore.store import Access, Manifest, Store
from kvstore.video.ask import Asker
from kvstore.video.model import load
from machine import ROOT
from plain_model import PlainModel

DEFAULT = "auto"
QUICK_QUESTIONS = 5
PASSAGE = "the true passage as text"
EVERYTHING = "the whole stream"
RETRIEVER = "external alone"
ALONE_WEIGHT = 1e6
"""So heavy that the policy's own ranks only part what the retriever holds for equal."""

Found = dict[tuple[str, bool], Scores]
"""By policy, and whether it was helped."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="model folder or GGUF file; the default is SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="what `make demo` left; read only")
    parser.add_argument("--policies", nargs="+", choices=sorted(rules()), help="only these; default: all")
    parser.add_argument("--questions", type=int, help="so many of the questions, evenly; default: all")
    parser.add_argument("--plot", type=Path, help="draw right answers by policy there, as SVG")


def rules() -> dict[str, Policy]:
    """All policies by name, and what those that end at the trained length would do beyond it."""
    found = {DEFAULT: policies()[DEFAULT], **policies()}
    for policy in policies().values():
        if policy.beyond is not None:
            name = f"{policy.name}-kept"
            found[name] = dataclasses.replace(policy, name=name, beyond=None)
    return found


def ask_all(
    recording: Recording,
    questions: Sequence[Question],
    language_model: LanguageModel,
    policy: Policy,
    words: WordVectors,
) -> tuple[Scores, Scores]:
    """(without, with) the words of the transcript: all questions, then all again, so that none finds its own blocks."""
    with Asker(recording.store, STREAM, language_model, policy=policy) as asker:
        alone, helped = Scores(asker.index_s), Scores(asker.index_s)
        asker.ask(questions[0].text, max_new_tokens=1)  # brings the preamble to the device
        alone.asked += [(question, asker.ask(question.text)) for question in questions]
        if policy.retrieves:  # others have nothing to fuse
            for question in questions:
                helped.asked.append((question, asker.ask(question.text, external=words.scores(question.text))))
    return alone, helped


def ask_retriever(
    recording: Recording, questions: Sequence[Question], language_model: LanguageModel, words: WordVectors
) -> Scores:
    """What the retriever alone would bring: whole blocks, as `auto` reads them."""
    with Asker(recording.store, STREAM, language_model) as asker:
        found = Scores(asker.index_s)
        asker.ask(questions[0].text, max_new_tokens=1)
        for question in questions:
            heavy = [ExtraScores(each.scores, ALONE_WEIGHT) for each in words.scores(question.text)]
            found.asked.append((question, asker.ask(question.text, external=heavy)))
    return found


def read_passages(
    recording: Recording, questions: Sequence[Question], language_model: LanguageModel, max_tokens: int
) -> float:
    """Share of questions that the model answers right when it reads the true passage as text: what it can."""
    plain = PlainModel(language_model)
    right = 0
    for question in questions:
        passage = recording.passage(question, language_model.encode, max_tokens)
        right += question.is_right(plain.answer(f"{passage}\n", question.text))
    return right / len(questions)


def report_one(report: Report, found: Found, way: tuple[str, bool], can: float, manifest: Manifest) -> None:
    """The figures of one way to ask; times beside those of the default policy, helped alike."""
    raw_nbytes = float(manifest.num_tokens * manifest.header.spec.token_nbytes)
    (name, is_external), one = way, found[way]
    case = {"external": is_external, "questions": len(one.asked)}
    report.value("right answers", "share", (name, one.right), (PASSAGE, can), **case)
    report.value("right moments", "share", (name, one.moments), ("all questions", 1.0), **case)
    report.value("attended", "tokens", (name, one.attended), (EVERYTHING, float(manifest.num_tokens)), **case)
    if not is_external:  # what is asked again finds some of its blocks on the device
        report.value("moved", "bytes/answer", (name, one.moved_nbytes), (EVERYTHING, raw_nbytes), **case)
    rival = (DEFAULT, is_external) if (DEFAULT, is_external) in found else way
    times = [Timing.of(found[each].first_token_s) for each in (way, rival)]
    report.latency("first token", (name, times[0]), (rival[0], times[1]), **case)


def main() -> None:
    """Ask every policy in turn; each has the stream to itself, as its own process would."""
    settings = options("questions", __doc__, add_options)
    recording = Recording.of(settings.folder)
    wanted = QUICK_QUESTIONS if settings.quick else len(recording.questions)
    questions = spread(recording.questions, settings.questions or wanted)
    language_model = load(settings.model)
    with Store.open(recording.store, access=Access.READ) as store:
        manifest = store.manifest(STREAM)
    words = WordVectors(recording.lines, manifest.entries)
    report = Report(settings, {"model": language_model.path.stem, "stream": manifest.num_tokens})
    found: Found = {}
    with torch.inference_mode():
        can = read_passages(recording, questions, language_model, manifest.header.block_tokens)
        check(can > 0, "the model answers nothing even from the true passage")
        for name, policy in rules().items():
            if settings.policies is not None and name not in settings.policies:
                continue
            alone, helped = ask_all(recording, questions, language_model, policy, words)
            for one in filter(lambda scores: scores.asked, (alone, helped)):
                found[name, one is helped] = one
                report_one(report, found, (name, one is helped), can, manifest)
            report.write()  # what is there, should a later one be stopped
        found[RETRIEVER, True] = ask_retriever(recording, questions, language_model, words)
    report_one(report, found, (RETRIEVER, True), can, manifest)
    print(table(found))
    if settings.plot is not None:
        settings.plot.write_text(bars(pairs(found)), encoding="utf-8")
    report.write()


def pairs(found: Found) -> dict[str, tuple[float, float]]:
    """Right answers (alone, helped) by policy, the best first; 0 where it was not asked so."""
    ways = {name: [(name, False), (name, True)] for name, _ in found}
    shares = {name: [found[way].right if way in found else 0.0 for way in both] for name, both in ways.items()}
    return {name: (alone, helped) for name, (alone, helped) in sorted(shares.items(), key=lambda item: -max(item[1]))}


if __name__ == "__main__":
    main()
