# SPDX-License-Identifier: Apache-2.0
"""`kvstore verify`: reads every block, checks it, and says which are damaged and what they held."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvstore.cli import arguments, text
from kvstore.cli.progress import Progress

if TYPE_CHECKING:
    from kvstore.store import BlockFault, VerifyReport
    from kvstore.tiers.upkeep.accounting import ByteAccount

_EXIT_DAMAGED = 1


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its arguments."""
    parser = commands.add_parser(
        "verify",
        help="look for damage",
        description="Read and check every block of a store, or of one stream. Exits with 1 when some are damaged.",
    )
    arguments.add_store(parser, stream=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify; the exit code says whether the store is sound."""
    from kvstore.cli.stored import find_stream, open_shelf
    from kvstore.store import Access, Store

    if options.stream is not None:
        find_stream(options.store, options.stream)
    else:
        with open_shelf(options.store):
            pass
    with Progress(sys.stderr) as progress, Store.open(options.store, access=Access.READ) as store:
        report = store.verify(
            options.stream,
            lambda done, total: progress.show(done / total, [f"{done:,}/{text.count(total, 'block')}"]),
        )
    if options.json:
        print(json.dumps(_as_json(report), indent=1))
    else:
        print("\n".join(_as_text(report)))
    return 0 if report.is_clean else _EXIT_DAMAGED


def _as_json(report: VerifyReport) -> dict[str, object]:
    return {
        "is_clean": report.is_clean,
        "blocks": report.num_blocks,
        "bytes_read": report.nbytes,
        "streams": report.num_streams,
        "damaged": [
            {
                "stream": fault.stream,
                "index": fault.index,
                "start_s": fault.start_s,
                "end_s": fault.end_s,
                "key": fault.key.hex(),
                "reason": fault.reason,
            }
            for fault in report.faults
        ],
        "structure": report.structure,
        "bytes": None if report.account is None else asdict(report.account),
    }


def _as_text(report: VerifyReport) -> list[str]:
    checked = (
        f"{text.count(report.num_blocks, 'block')} of {text.count(report.num_streams, 'stream')} checked, "
        f"{text.size(report.nbytes)} read"
    )
    where = [] if report.account is None else [_account(report.account)]
    if report.is_clean:
        return [f"no damage: {checked}", *where]
    damaged = [f"damaged: {_place(fault)}: {text.printable(fault.reason)}" for fault in report.faults]
    broken = [f"catalogue: {text.printable(problem)}" for problem in report.structure]
    found = text.count(len(report.faults), "damaged block")
    contradictions = f", {text.count(len(broken), 'contradiction')} in the catalogue" if broken else ""
    return [*damaged, *broken, f"{found}{contradictions}: {checked}", *where]


def _account(account: ByteAccount) -> str:
    parts = [
        (account.record_nbytes, "of records"),
        (account.padding_nbytes, "of padding"),
        (account.free_nbytes, "free"),
        (account.orphan_nbytes, "of nobody"),
        (-account.beyond_nbytes, "cut off"),
        (account.unaccounted_nbytes, "unaccounted for"),
    ]
    listed = " + ".join(f"{nbytes:,} {what}" for nbytes, what in parts if nbytes or what == "free")
    return f"extent files: {account.file_nbytes:,} bytes = {listed}"


def _place(fault: BlockFault) -> str:
    if fault.stream is not None and fault.index is None:
        return f"stream {text.printable(fault.stream)}"
    if fault.stream is None or fault.start_s is None or fault.end_s is None:
        return f"block {fault.key.hex()[:16]} of no stream"
    return f"stream {text.printable(fault.stream)}, block {fault.index}, {text.span(fault.start_s, fault.end_s)}"
