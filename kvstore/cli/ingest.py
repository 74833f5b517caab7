# SPDX-License-Identifier: Apache-2.0
"""`kvstore ingest`: reads a video into a stream, or goes on where it was interrupted."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import TYPE_CHECKING

from kvstore.cli import arguments, text
from kvstore.cli.heap import release_free_memory
from kvstore.cli.interrupt import Interruptible
from kvstore.cli.progress import Progress
from kvstore.errors import CapacityError, KVStoreError, StoreIOError
from kvstore.record import PROFILES, Profile
from kvstore.video.prompt import stamp

if TYPE_CHECKING:
    from kvstore.video.ingest import IngestProgress

_EXIT_INTERRUPTED = 130


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its arguments."""
    parser = commands.add_parser(
        "ingest",
        help="read a video into a stream",
        description="Read a video into a stream. Interrupted at any moment, the same command goes on from there.",
    )
    parser.add_argument("video", type=arguments.path, metavar="VIDEO", help="the video file")
    arguments.add_store(parser, stream=True)
    arguments.add_model(parser)
    parser.add_argument("--fps", type=arguments.rate, default=1.0, help="frames per second to look at (default 1)")
    parser.add_argument(
        "--profile",
        choices=[str(profile) for profile in PROFILES],
        default=str(Profile.LOSSLESS),
        help="how blocks are coded (default lossless)",
    )
    parser.add_argument("--policy", default="auto", metavar="NAME", help="policy to prepare the stream for")
    parser.add_argument("--disk", type=arguments.size, metavar="SIZE", help="most that the store may take, e.g. 200GiB")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ingest; see `kvstore.video.ingest`."""
    from kvstore.video.decode import probe

    probe(options.video)  # before the seconds that loading a model takes
    from kvstore.retrieval.registry import policy_named

    policy_named(options.policy)
    from kvstore.video.ingest import IngestConfig, ingest
    from kvstore.video.model import load

    config = IngestConfig(
        fps=options.fps, profile=Profile(options.profile), policy=options.policy, disk_nbytes=options.disk
    )
    with Progress(sys.stderr) as progress:
        progress.note("loading the model")
        language_model = load(options.model)
        display = _Display(progress)
        try:
            with Interruptible() as interruptible:

                def on_progress(state: IngestProgress) -> None:
                    display.show(state)
                    release_free_memory()
                    interruptible.check()

                last = ingest(options.video, options.store, options.stream, language_model, config, on_progress)
        except KeyboardInterrupt:
            held = _stored(options) or "nothing of the video is stored yet"
            progress.say(f"kvstore: stopped; {held}; the same command goes on from there")
            return _EXIT_INTERRUPTED
        except (CapacityError, StoreIOError) as error:
            stored = _stored(options)
            if stored is None:
                raise
            free = text.size(shutil.disk_usage(options.store).free)
            raise type(error)(
                f"{error}; {stored} and can be asked; the file system has {free} free; "
                "with more room the same command goes on from there"
            ) from error
    for line in _summary(options.stream, last, is_new=display.has_begun):
        print(line)
    return 0


class _Display:
    """Turns the states of an ingest into lines."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.has_begun = False

    def show(self, state: IngestProgress) -> None:
        """Show one state; before the first one of a resumed run, say where it began."""
        if not self.has_begun and state.resumed_s > 0:
            self._progress.say(f"resumed at {stamp(state.resumed_s)}")
        self.has_begun = True
        if state.calibrated is not None:
            self._progress.show(state.calibrated, ["calibrating; the video waits"])
            return
        fraction = min(state.video_s / state.duration_s, 1.0) if state.duration_s > 0 else None
        self._progress.show(
            fraction,
            [
                f"{stamp(state.video_s)}/{text.duration(state.duration_s or None)}",
                f"{_per_s(state.num_frames, state):.1f} frames/s",
                f"{_per_s(state.new_tokens, state):.0f} tokens/s",
                f"host {text.size(state.host_nbytes)}",
                f"disk {text.size(state.disk_nbytes)}",
                f"ETA {text.duration(_remaining_s(state))}",
            ],
        )


def _stored(options: argparse.Namespace) -> str | None:
    """What the store holds of the video now, in words; None when there is no such stream, or nobody can tell."""
    from kvstore.cli.stored import find_stream, read_until

    try:
        until_s = read_until(find_stream(options.store, options.stream))
    except KVStoreError:
        return None
    return f"{stamp(until_s or 0.0)} of the video is stored"


def _summary(name: str, last: IngestProgress, *, is_new: bool) -> list[str]:
    holds = (
        f"{text.duration(last.duration_s)} of video, {text.count(last.num_tokens, 'token')} in "
        f"{text.count(last.num_blocks, 'block')}; the store takes {text.size(last.disk_nbytes)}"
    )
    if not is_new:
        return [f"{text.printable(name)} is complete already: {holds}"]
    read_s = last.video_s - last.resumed_s
    pace = f"{read_s / last.elapsed_s:.1f} times real time" if last.elapsed_s > 0 else "at once"
    return [
        f"{text.printable(name)} is complete: {holds}",
        f"read {text.duration(read_s)} in {last.elapsed_s:.1f} s: {pace}, "
        f"{_per_s(last.num_frames, last):.1f} frames/s, {_per_s(last.new_tokens, last):.0f} tokens/s",
    ]


def _per_s(number: int, state: IngestProgress) -> float:
    return number / state.elapsed_s if state.elapsed_s > 0 else 0.0


def _remaining_s(state: IngestProgress) -> float | None:
    """Seconds left at the pace of this run; None before anybody can tell."""
    done_s = state.video_s - state.resumed_s
    if done_s <= 0 or state.duration_s <= 0:
        return None
    return max(state.duration_s - state.video_s, 0.0) * state.elapsed_s / done_s
