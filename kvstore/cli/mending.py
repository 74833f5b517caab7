# SPDX-License-Identifier: Apache-2.0
"""`kvstore repair` and `kvstore compact`: make a damaged store whole again, and a large one small."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from kvstore.cli import arguments, text
from kvstore.cli.progress import Progress

if TYPE_CHECKING:
    from kvstore.tiers.upkeep.repair import RepairReport

_EXIT_LOST = 1


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare both commands and their arguments."""
    repair = commands.add_parser(
        "repair",
        help="drop what is damaged",
        description="Read every block, drop what is damaged, and make the catalogue agree with itself again. What is "
        "sound is not touched. Exits with 1 when blocks are lost; `kvstore import` brings them back from an export.",
    )
    compact = commands.add_parser(
        "compact",
        help="shorten the files",
        description="Move blocks into the holes before them and give the rest back to the file system. Readers may go "
        "on; a kill does no harm.",
    )
    for parser, run in ((repair, run_repair), (compact, run_compact)):
        arguments.add_store(parser, stream=None)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(run=run)


def run_repair(options: argparse.Namespace) -> int:
    """Repair, and say what was done."""
    from kvstore.cli.stored import open_for_upkeep
    from kvstore.tiers.upkeep.repair import Repairer

    with open_for_upkeep(options.store) as (disk, pool), Progress(sys.stderr) as progress:
        report = Repairer(disk, pool).run(
            lambda done, total: progress.show(done / total, [f"{done:,}/{text.count(total, 'block')}"])
        )
    if options.json:
        print(json.dumps(_repair_as_json(report), indent=1))
    else:
        print("\n".join(_repair_as_text(report)))
    return _EXIT_LOST if report.lost or report.dropped or report.unreadable else 0


def run_compact(options: argparse.Namespace) -> int:
    """Compact, and say what that freed."""
    from kvstore.cli.stored import open_for_upkeep
    from kvstore.tiers.upkeep.compact import Compactor

    with open_for_upkeep(options.store) as (disk, pool), Progress(sys.stderr) as progress:
        report = Compactor(disk, pool).run(
            lambda moved, left: progress.show(None, [f"{text.size(moved)} moved", f"files of {text.size(left)}"])
        )
    freed_nbytes = report.before_nbytes - report.after_nbytes
    if options.json:
        figures = {
            "moved_blocks": report.moved_blocks,
            "moved_nbytes": report.moved_nbytes,
            "before_nbytes": report.before_nbytes,
            "after_nbytes": report.after_nbytes,
        }
        print(json.dumps(figures, indent=1))
    else:
        print(
            f"{text.size(freed_nbytes)} freed, {text.size(report.after_nbytes)} left: "
            f"{text.count(report.moved_blocks, 'block')} moved, {text.size(report.moved_nbytes)}"
        )
    return 0


def _repair_as_json(report: RepairReport) -> dict[str, object]:
    return {
        "blocks": report.num_blocks,
        "dropped": [{"key": key.hex(), "reason": reason} for key, reason in report.dropped.items()],
        "unreadable": [{"key": key.hex(), "reason": reason} for key, reason in report.unreadable.items()],
        "mended": report.mended,
        "lost": [{"stream": stream, "index": index} for stream, index in report.lost],
    }


def _repair_as_text(report: RepairReport) -> list[str]:
    lines = [f"dropped: block {key.hex()[:16]}: {text.printable(why)}" for key, why in report.dropped.items()]
    lines += [f"left alone: block {key.hex()[:16]}: {text.printable(why)}" for key, why in report.unreadable.items()]
    lines += [f"mended: {text.printable(what)}" for what in report.mended]
    lines += [f"lost: stream {text.printable(stream)}, block {index}" for stream, index in report.lost]
    read = f"{text.count(report.num_blocks, 'block')} read"
    if not lines:
        return [f"nothing to repair: {read}"]
    return [*lines, f"{text.count(len(report.dropped), 'block')} dropped, {len(report.lost)} lost by streams: {read}"]
