# SPDX-License-Identifier: Apache-2.0
"""`kvstore stats`: what a store holds, and what the processes that use it are doing."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.cli import arguments, text

if TYPE_CHECKING:
    from kvstore.stats import RemoteStats, StoreStats, TierStats
    from kvstore.watch.live import LiveStats


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its arguments."""
    parser = commands.add_parser(
        "stats",
        help="show what a store and its processes do",
        description="Show what a store holds on disk, and the counters of the processes that ingest and ask.",
    )
    arguments.add_store(parser, stream=None)
    parser.add_argument(
        "--watch",
        type=arguments.rate,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="show it again every so many seconds (2), with what moved in between, until Ctrl-C",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a time")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the counters once, or until interrupted."""
    from kvstore.cli.stored import open_shelf
    from kvstore.store import Access, Store
    from kvstore.watch.live import read_live

    with open_shelf(options.store):  # says what to do where there is no store
        pass
    earlier: dict[int, LiveStats] = {}
    with Store.open(options.store, access=Access.READ) as store:
        while True:
            stats, processes = store.stats(), read_live(options.store)
            if options.json:
                print(json.dumps(_plain(stats, processes)), flush=True)
            else:
                print("\n".join(_lines(options.store, stats, processes, earlier)), flush=True)
            if options.watch is None:
                return 0
            if not options.json:
                print()
            earlier = {each.process_id: each for each in processes}
            time.sleep(options.watch)


def _plain(stats: StoreStats, processes: list[LiveStats]) -> dict[str, object]:
    return {
        "disk": {
            **asdict(stats.usage),
            "blocks": stats.num_blocks,
            "streams": stats.num_streams,
            "objects": stats.num_objects,
        },
        "processes": [_process(each) for each in processes],
    }


def _process(live: LiveStats) -> dict[str, object]:
    plain = asdict(live)
    plain["stats"]["durations"] = {"/".join(name): asdict(each) for name, each in live.stats.durations.items()}
    return plain


def _lines(folder: Path, stats: StoreStats, processes: list[LiveStats], earlier: dict[int, LiveStats]) -> list[str]:
    usage = stats.usage
    held = f"{text.count(stats.num_streams, 'stream')}, {text.count(stats.num_blocks, 'block')}"
    held += f", {text.count(stats.num_objects, 'object')}" if stats.num_objects else ""
    lines = [
        f"{folder}: {held}; {text.size(usage.extent_used_nbytes)} of blocks, {text.size(usage.total_nbytes)} on disk, "
        f"{text.size(usage.catalogue_nbytes)} of it catalogue"
    ]
    for each in processes:
        lines += ["", *_of_process(each, earlier.get(each.process_id))]
    return lines if processes else [*lines, "no process publishes counters now"]


def _of_process(live: LiveStats, before: LiveStats | None) -> list[str]:
    stats = live.stats
    age_s = max(0.0, time.time() - live.unix_s)
    lines = [
        f"{text.printable(live.command)} (process {live.process_id}), {age_s:.0f} s ago: "
        f"{text.count(stats.queued_blocks, 'block')} to write, "
        f"{stats.host_slots_used} of {text.count(stats.host_slots, 'host slot')} used"
    ]
    passed_s = 0.0 if before is None else live.unix_s - before.unix_s
    titles = ("tier", "hits", "misses", "damaged", "evicted", "read", "written", "read/s", "written/s")
    earlier = {} if before is None else _tiers(before.stats)
    rows = [_row(name, now, earlier.get(name), passed_s) for name, now in _tiers(stats).items()]
    lines += [f"  {line}" for line in text.table(titles, rows)]
    for (tier, operation), histogram in sorted(stats.durations.items()):
        known = None if before is None else before.stats.durations.get((tier, operation))
        recent = histogram if known is None else histogram.since(known)
        if recent.count:
            middle, tail = (text.short_time(recent.quantile_s(share)) for share in (0.5, 0.99))
            times = text.count(recent.count, "time")
            lines.append(f"  {tier} {operation}: {times}, half within {middle}, 99 % within {tail}")
    return lines if stats.remote is None else [*lines, f"  remote: {_of_server(stats.remote)}"]


def _tiers(stats: StoreStats) -> dict[str, TierStats]:
    tiers = {"host": stats.host, "disk": stats.disk}
    return tiers if stats.remote is None else {**tiers, "remote": stats.remote.tier}


def _of_server(remote: RemoteStats) -> str:
    return (
        f"breaker {remote.breaker}, opened {text.count(remote.breaker_opened, 'time')}; "
        f"{text.count(remote.timed_out, 'block')} timed out, {remote.unavailable:,} unavailable, {remote.full:,} full; "
        f"{remote.queued_offers:,} to send, {remote.dropped_offers:,} dropped"
    )


def _row(name: str, now: TierStats, then: TierStats | None, passed_s: float) -> tuple[str, ...]:
    def rate(field: str) -> str:
        if then is None or passed_s <= 0:
            return "-"
        return text.size((getattr(now, field) - getattr(then, field)) / passed_s)

    counted = (f"{getattr(now, field):,}" for field in ("hits", "misses", "damaged", "evicted_blocks"))
    moved = (text.size(getattr(now, field)) for field in ("read_nbytes", "written_nbytes"))
    return (name, *counted, *moved, rate("read_nbytes"), rate("written_nbytes"))
