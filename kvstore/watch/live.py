# SPDX-License-Identifier: Apache-2.0
"""What running processes do with a store, for other processes to read: a file each, locked while its process lives."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from kvstore.errors import KVStoreError
from kvstore.stats import BreakerState, DiskUsage, RemoteStats, StoreStats, TierStats
from kvstore.store import Store
from kvstore.telemetry.histogram import NUM_BUCKETS, Histogram

FOLDER = "live"
_MAX_NBYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class LiveStats:
    """The latest counters of one process.

    Args:
        process_id: as that process knows it; another one in a container may have the same.
        command: what the process calls itself.
        unix_s: when the counters were read.
        stats: since that process opened the store.
    """

    process_id: int
    command: str
    unix_s: float
    stats: StoreStats


@contextmanager
def publish(store: Store, folder: Path, command: str, interval_s: float = 1.0) -> Iterator[None]:
    """Let other processes see this one's counters for the length of a `with` block.

    Whoever may not write to the store's folder, or finds it full, publishes nothing: counters are no reason to fail.

    Args:
        store: open in this process.
        folder: the store's folder.
        command: a word for people, such as `ingest`.
        interval_s: seconds between two readings.
    """
    path = folder / FOLDER / f"{os.getpid()}-{time.time_ns()}.json"
    file = _create(path)
    if file is None:
        yield
        return
    is_over = threading.Event()

    def run() -> None:
        while True:
            with suppress(OSError, KVStoreError):
                _write(file, LiveStats(os.getpid(), command, time.time(), store.stats()))
            if is_over.wait(interval_s):
                return

    thread = threading.Thread(target=run, name="kvstore-live", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        with suppress(OSError):
            path.unlink()
        file.close()


def read_live(folder: Path) -> list[LiveStats]:
    """Return the counters of the processes that publish them now; what the dead left behind is passed over.

    Args:
        folder: a store's folder.
    """
    found = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        with suppress(OSError), path.open("rb") as file:
            if _is_locked(file):
                stats = _parsed(file.read(_MAX_NBYTES))
                found += [] if stats is None else [stats]
    return found


def _create(path: Path) -> IO[bytes] | None:
    """Open and lock a new file before others see it under its name; None where that is not possible."""
    hidden = path.with_suffix(".new")
    with ExitStack() as building:
        try:
            path.parent.mkdir(exist_ok=True)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            building.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)  # else another may find our file before it is locked
            for left in path.parent.iterdir():
                with left.open("rb") as other:
                    if not _is_locked(other):
                        left.unlink()
            with ExitStack() as opening:
                file = opening.enter_context(hidden.open("xb", buffering=0))
                fcntl.flock(file, fcntl.LOCK_EX)
                hidden.rename(path)
                opening.pop_all()
        except OSError:
            return None
        return file


def _is_locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _write(file: IO[bytes], live: LiveStats) -> None:
    plain = asdict(live)
    durations = {"/".join(name): asdict(each) for name, each in live.stats.durations.items()}
    plain["stats"]["durations"] = durations
    # In place and of one length: a reader sees one state or, for a moment, what it cannot parse.
    os.pwrite(file.fileno(), json.dumps(plain).encode().ljust(_MAX_NBYTES)[:_MAX_NBYTES], 0)


def _tier(given: dict[str, float]) -> TierStats:
    numbers = {field.name: given[field.name] for field in fields(TierStats)}
    if not all(isinstance(number, int | float) for number in numbers.values()):
        raise TypeError("counters are numbers")
    return TierStats(**numbers)  # type: ignore[arg-type]  # counts and seconds alike


def _remote(given: dict[str, Any]) -> RemoteStats:
    names = [field.name for field in fields(RemoteStats) if field.name not in ("tier", "breaker")]
    counts = {name: int(given[name]) for name in names}
    return RemoteStats(tier=_tier(given["tier"]), breaker=BreakerState(given["breaker"]), **counts)


def _parsed(data: bytes) -> LiveStats | None:
    try:
        plain = json.loads(data)
        given = plain["stats"]
        durations = {}
        for name, each in given["durations"].items():
            tier, _, operation = name.partition("/")
            counts = tuple(int(count) for count in each["counts"])
            if len(counts) != NUM_BUCKETS:
                return None
            durations[tier, operation] = Histogram(counts, float(each["total_s"]))
        stats = StoreStats(
            host=_tier(given["host"]),
            disk=_tier(given["disk"]),
            remote=None if given.get("remote") is None else _remote(given["remote"]),
            usage=DiskUsage(**{field.name: int(given["usage"][field.name]) for field in fields(DiskUsage)}),
            durations=durations,
            num_objects=int(given.get("num_objects", 0)),
            **{
                name: int(given[name])
                for name in ("num_blocks", "num_streams", "host_slots", "host_slots_used", "queued_blocks")
            },
        )
        return LiveStats(int(plain["process_id"]), str(plain["command"]), float(plain["unix_s"]), stats)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
