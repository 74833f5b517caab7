# SPDX-License-Identifier: Apache-2.0
"""`kvstore export` and `kvstore import`: a stream with all that it needs, to a file and from one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvstore.cli import arguments, text
from kvstore.cli.progress import Progress

_EXIT_MISSING = 1


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare both commands and their arguments."""
    export = commands.add_parser(
        "export",
        help="write a stream to a file",
        description="Write a stream with blocks, summaries and calibrations to a file, which appears when it is whole.",
    )
    arguments.add_store(export, stream=True)
    _add_file(export)
    export.set_defaults(run=run_export)
    importing = commands.add_parser(
        "import",
        help="bring a stream from a file",
        description="Bring an exported stream into a store, which is made where there is none. Where the stream is "
        "there already, blocks that it has lost come back. An import that was stopped is finished by the next one.",
    )
    arguments.add_store(importing, stream=None)
    importing.add_argument("--stream", type=arguments.text, metavar="NAME", help="what to call it (default: its name)")
    _add_file(importing)
    importing.set_defaults(run=run_import)


def run_export(options: argparse.Namespace) -> int:
    """Export, and say what was missing."""
    from kvstore.cli.stored import find_stream, open_for_upkeep
    from kvstore.config import Access
    from kvstore.tiers.upkeep.export_stream import export_stream

    find_stream(options.store, options.stream)
    with open_for_upkeep(options.store, Access.READ) as (disk, pool), Progress(sys.stderr) as progress:
        report = export_stream(
            disk,
            pool,
            options.stream,
            options.file,
            lambda done, total: progress.show(done / total, [f"{done:,}/{text.count(total, 'block')}"]),
        )
    for key in report.missing:
        print(f"missing: block {key.hex()[:16]}; `kvstore verify` says where")
    print(f"exported {text.printable(options.stream)}: {_size(report.num_entries, report.num_objects, report.nbytes)}")
    return _EXIT_MISSING if report.missing else 0


def run_import(options: argparse.Namespace) -> int:
    """Import, and say what was missing."""
    from kvstore.cli.stored import open_for_upkeep
    from kvstore.tiers.upkeep.import_stream import import_stream

    path: Path = options.file
    with open_for_upkeep(options.store, may_create=True) as (disk, pool), Progress(sys.stderr) as progress:
        report = import_stream(
            disk,
            pool,
            path,
            options.stream,
            lambda done, total: progress.show(done / total, [f"{text.size(done)}/{text.size(total)}"]),
        )
    for key in report.missing:
        print(f"missing: block {key.hex()[:16]}; neither the file nor the store holds it")
    word = "imported" if report.is_new else "was there already, and is whole again:"
    size = _size(report.num_entries, report.num_objects, path.stat().st_size)
    print(f"{word} {text.printable(report.header.name)}: {size}")
    return _EXIT_MISSING if report.missing else 0


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=arguments.path, metavar="FILE", help="the file")


def _size(num_entries: int, num_objects: int, nbytes: int) -> str:
    objects = f"{text.count(num_objects, 'object')}, " if num_objects else ""
    return f"{text.count(num_entries, 'block')}, {objects}a file of {text.size(nbytes)}"
