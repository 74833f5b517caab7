# SPDX-License-Identifier: Apache-2.0
"""The demo's questions, asked of one recording that was stored with each profile: right answers, size, memory.

What a lossy profile costs where it matters: not a divergence, but answers that are no longer right.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import Report, check, options
from kvstore.engines.loading import LanguageModel
from kvstore.record import PROFILES, Profile
from kvstore.store import Access, Store
from kvstore.video.ask import Asker
from kvstore.video.model import load
from machine import ROOT

sys.path.append(str(ROOT / "examples"))
from demo_scoring import Json, is_hit, is_moment_found, wordings
from demo_steps import Usage, run

STREAM = "reading"
HOURS, QUICK_HOURS = 1.0, 0.3
MOST_LOST = 1
"""Questions that a profile may answer worse than the exact one."""
LEAST_SMALLER = {Profile.Q4: 2.5, Profile.Q3: 3.5, Profile.Q2: 4.0}
"""Times by which a store must be smaller than the lossless one, index and catalogue counted. Of a recording of an hour,
a fifth is stored before there is a calibration; shorter ones are not held to it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one profile.

    Args:
        known: questions with known answers that were answered right.
        natural: questions about the text that were answered right.
        moments: questions whose moment was found.
        store_nbytes: of the whole store.
    """

    known: int
    natural: int
    moments: int
    store_nbytes: int


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--video", type=Path, help="a recording of examples/record_screen.py, its JSON beside it")
    parser.add_argument("--hours", type=float, help=f"length of the recording to make (default {HOURS:g})")
    parser.add_argument(
        "--profiles",
        nargs="+",
        type=Profile,
        choices=[profile for profile in PROFILES if profile is not Profile.LOSSLESS],
        default=[Profile.Q3],
        help="profiles to compare with lossless (default q3)",
    )


def record(folder: Path, hours: float) -> Path:
    """Make a recording."""
    video = folder / "reading.mp4"
    run([sys.executable, ROOT / "examples" / "record_screen.py", "--out", video, "--hours", str(hours)])
    return video


def ingest(video: Path, store: Path, profile: Profile) -> Usage:
    """Read the recording into a new store, in a process of its own."""
    command: list[str | Path] = [sys.executable, "-m", "kvstore", "ingest", video, "--store", store]
    return run([*command, "--stream", STREAM, "--profile", str(profile)])


def ask(store: Path, language_model: LanguageModel, truth: Json) -> Outcome:
    """Ask all questions, and print those that were answered wrong."""
    known = natural = moments = 0
    with Asker(store, STREAM, language_model) as asker:
        for fact in (*truth["facts"], *truth["natural"]):
            answer = asker.ask(fact["question"])
            question = {"kind": fact["kind"], "expected": fact["answer"], "accept": fact["accept"]}
            question |= {"true_spans": fact["spans"], "retrieval": answer.to_json()}
            moments += is_moment_found(question)
            if not is_hit(answer.answer, wordings(question)):
                print(f"# wrong: {fact['question']} {answer.answer!r}, not {fact['answer']!r}", flush=True)
            elif fact["kind"] == "natural":
                natural += 1
            else:
                known += 1
    with Store.open(store, access=Access.READ) as opened:
        usage = opened.stats().usage
    return Outcome(known, natural, moments, usage.extent_used_nbytes + usage.catalogue_nbytes)


def report_profile(
    profile: Profile, found: Outcome, usage: Usage, exact: Outcome, exact_usage: Usage, report: Report
) -> None:
    """Report one profile against the exact one."""
    name, baseline = str(profile), str(Profile.LOSSLESS)
    for metric, unit, value, limit in (
        ("answers_right", "questions", found.known + found.natural, exact.known + exact.natural),
        ("known_right", "questions", found.known, exact.known),
        ("moments_found", "questions", found.moments, exact.moments),
        ("store", "MB", found.store_nbytes / 1e6, exact.store_nbytes / 1e6),
        ("ingest_peak", "MiB", usage.peak_rss_nbytes / 2**20, exact_usage.peak_rss_nbytes / 2**20),
        ("ingest", "s", usage.wall_s, exact_usage.wall_s),
    ):
        report.value(metric, unit, (name, value), (baseline, limit))


def check_comparable(exact: Outcome) -> None:
    """The exact store is what others are divided by."""
    check(
        exact.known > 0 and exact.moments > 0,
        f"lossless answers {exact.known} questions and finds {exact.moments} moments: take a longer recording",
    )


def main() -> None:
    """Record, store with every profile, ask."""
    settings = options("profiles", __doc__, add_options)
    report = Report(settings)
    with TemporaryDirectory() as folder:
        hours = settings.hours or (QUICK_HOURS if settings.quick else HOURS)
        video = settings.video or record(Path(folder), hours)
        truth: Json = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
        language_model = load(None)
        store = Path(folder) / str(Profile.LOSSLESS)
        exact_usage = ingest(video, store, Profile.LOSSLESS)
        exact = ask(store, language_model, truth)
        check_comparable(exact)
        for profile in settings.profiles:
            store = Path(folder) / str(profile)
            usage = ingest(video, store, profile)
            found = ask(store, language_model, truth)
            report_profile(profile, found, usage, exact, exact_usage, report)
            lost = exact.known + exact.natural - found.known - found.natural
            check(lost <= MOST_LOST, f"{profile} answers {lost} questions worse than lossless")
            smaller = exact.store_nbytes / found.store_nbytes
            least = LEAST_SMALLER.get(profile, 0.0) if truth["duration_s"] >= 3600 else 0.0
            check(smaller >= least, f"a {profile} store is {smaller:.2f} times smaller, not {least}")
    report.write()


if __name__ == "__main__":
    main()
