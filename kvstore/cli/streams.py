# SPDX-License-Identifier: Apache-2.0
"""`kvstore ls`: lists the streams of a store."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kvstore.cli import arguments, text

if TYPE_CHECKING:
    from kvstore.cli.stored import Shelf


@dataclass(frozen=True, slots=True)
class StreamLine:
    """One line of the list; `nbytes` counts blocks that several streams share in each of them."""

    name: str
    model: str
    fingerprint: str
    tokens: int
    blocks: int
    duration_s: float | None
    read_s: float | None
    is_complete: bool
    nbytes: int


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its arguments."""
    parser = commands.add_parser("ls", help="list the streams", description="List the streams of a store.")
    arguments.add_store(parser, stream=None)
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """List the streams."""
    from kvstore.cli.stored import open_shelf

    with open_shelf(options.store) as shelf:
        lines = [_line(shelf, name) for name in shelf.names()]
    if options.json:
        print(json.dumps([asdict(line) for line in lines], indent=1))
    elif not lines:
        print("no streams")
    else:
        titles = ("name", "model", "state", "duration", "tokens", "blocks", "size")
        print("\n".join(text.table(titles, [_cells(line) for line in lines], left=3)))
    return 0


def _line(shelf: Shelf, name: str) -> StreamLine:
    from kvstore.cli.stored import read_until

    manifest = shelf.manifest(name)
    blocks = shelf.blocks(list({entry.key for entry in manifest.entries}))
    spec = manifest.header.spec
    duration_s = manifest.header.source.get("duration_s")
    return StreamLine(
        name=name,
        model=text.model(spec),
        fingerprint=spec.fingerprint,
        tokens=manifest.num_tokens,
        blocks=len(manifest.entries),
        duration_s=float(duration_s) if isinstance(duration_s, (int, float)) else None,
        read_s=read_until(manifest),
        is_complete=manifest.is_complete,
        nbytes=sum(block.record.extent.nbytes for block in blocks if block is not None),
    )


def _cells(line: StreamLine) -> tuple[str, ...]:
    if line.is_complete:
        state = "complete"
    elif line.read_s is not None:
        state = f"resumable at {text.duration(line.read_s)}"
    else:
        state = "open"
    return (
        text.printable(line.name),
        text.printable(line.model),
        state,
        text.duration(line.duration_s),
        f"{line.tokens:,}",
        f"{line.blocks:,}",
        text.size(line.nbytes),
    )
