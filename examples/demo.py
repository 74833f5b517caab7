# SPDX-License-Identifier: Apache-2.0
"""The worked example: records two hours of screen, lets a language model watch them, and asks what was in them.

python examples/demo.py      everything goes to the folder demo; what is there already is not made again
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

from demo_scoring import Json
from demo_steps import digest_of, drop_page_cache, machine, run
from demo_table import seconds, sums
from report import page
from thumbnails import Thumbnails

_HERE = Path(__file__).parent
_ROOT = _HERE.parent
_SEED = 0
_STREAM = "reading"
_EXACT = "lossless"
_PROFILES = (_EXACT, "q8", "q4", "q3", "q2")
_RECORDER = ("record_screen.py", "demo_pages.py", "demo_screen.py", "narrator.py", "demo_facts.json")
_RECORDER_PACKAGES = ("av", "numpy", "pillow", "espeakng-loader")


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=_ROOT / "demo", help="where everything goes (default demo)")
    parser.add_argument("--hours", type=float, default=2.1, help="length of the recording (default 2.1)")
    parser.add_argument(
        "--profile", choices=_PROFILES, default=_EXACT, help="how blocks are coded, in a store of its own each"
    )
    options = parser.parse_args()
    began = time.perf_counter()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    results: Json = {"made_unix_s": time.time(), "machine": machine()}
    video = folder / "reading.mp4"
    results["recording"] = _record(video, options.hours)
    store = folder / ("store" if options.profile == _EXACT else f"store-{options.profile}")
    results["ingest"] = _ingest(video, store, options.profile)
    results |= _ask(store, video)
    print("\n[4/4] Writing the report")
    asked_s = time.perf_counter() - began
    report, figures = folder / "report.html", folder / "results.json"
    report.write_text(page(results, Thumbnails(video)), encoding="utf-8")
    wall_s = time.perf_counter() - began
    results |= {"report": {"wall_s": wall_s - asked_s}, "wall_s": wall_s}
    figures.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(["", *sums(results), f"{'this run':14}{seconds(wall_s)} in all", ""]))
    print(f"report        {report}\nall figures   {figures}\nstart afresh  rm -r {folder}")


def _record(video: Path, hours: float) -> Json:
    """Record the video, unless it is there and the recorder has not changed since."""
    print(f"[1/4] Recording {hours:g} hours of someone who reads a manual and takes notes")
    note = video.with_suffix(".recorded")
    digest = digest_of([_HERE / name for name in _RECORDER], _RECORDER_PACKAGES, [hours, _SEED])
    known: Json = json.loads(note.read_text()) if note.is_file() else {}
    if known.get("digest") == digest and video.is_file() and video.with_suffix(".json").is_file():
        print(f"{video} is there already, and the recorder has not changed")
    else:
        note.unlink(missing_ok=True)
        command: list[str | Path] = [sys.executable, _HERE / "record_screen.py", "--out", video]
        command += ["--hours", str(hours), "--seed", str(_SEED)]
        usage = run(command)
        truth: Json = json.loads(video.with_suffix(".json").read_text())
        known = {
            "digest": digest,
            "wall_s": usage.wall_s,
            "duration_s": truth["duration_s"],
            "num_screens": len(truth["screens"]),
            "nbytes": video.stat().st_size,
        }
        note.write_text(json.dumps(known) + "\n")
    return known


def _ingest(video: Path, store: Path, profile: str) -> Json:
    """Read the video into a stream; the figures of the run that completed it are kept beside the store."""
    print("\n[2/4] Reading it: what is shown and said goes through the model, the KV blocks go to disk")
    note = store.with_suffix(".ingested")
    digest = json.loads(video.with_suffix(".recorded").read_text())["digest"]
    known: Json = json.loads(note.read_text()) if note.is_file() else {}
    if known.get("digest") != digest:
        shutil.rmtree(store, ignore_errors=True)
        known = {"digest": digest}
        note.write_text(json.dumps(known) + "\n")
    is_resumed = store.exists()
    # The command itself sees what there is to do: all, the rest of an interrupted run, or nothing.
    command: list[str | Path] = [sys.executable, "-m", "kvstore", "ingest", video, "--store", store]
    usage = run([*command, "--stream", _STREAM, "--profile", profile])
    if "wall_s" not in known:
        known |= asdict(usage) | {"is_resumed": is_resumed}
        note.write_text(json.dumps(known) + "\n")
    return known


def _ask(store: Path, video: Path) -> Json:
    """Ask in a new process, with nothing of the store in memory."""
    print("\n[3/4] Asking, in a new process; the store's files are dropped from the page cache first\n")
    out = store.with_name("answers.json")
    drop_page_cache(store)
    command: list[str | Path] = [sys.executable, _HERE / "demo_ask.py", "--store", store]
    usage = run([*command, "--stream", _STREAM, "--truth", video.with_suffix(".json"), "--out", out])
    answers: Json = json.loads(out.read_text())
    out.unlink()
    return answers | {"ask": asdict(usage)}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("demo: interrupted; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
