# SPDX-License-Identifier: Apache-2.0
"""A disk that fails, stops short or stalls under a store: typed errors or misses, no harm to what is stored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import kvstore
import kvstore.store
from kvstore.errors import CapacityError, ConfigError, KVStoreError, ReadOnlyError, StoreIOError
from kvstore.native import IoPool
from kvstore.store import Access, FetchRequest, Outcome, Store
from kvstore.tiers.upkeep.compact import Compactor
from tests.faulty_disk import EIO, ENOSPC, EROFS, build, faults
from tests.store_blocks import HEADER, block_key, empty_slot, make_blocks, make_slot, open_store, same_block

NUM_BLOCKS = 6
STALL_S = 5.0
PATIENCE_S = 60.0
OK = "ok"
NO_RING = "the kernel has no ring whose results come when asked for"


def stored(path: Path) -> Store:
    """A store with a stream on disk; memory holds two blocks at most."""
    with open_store(path) as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(NUM_BLOCKS), {"next": NUM_BLOCKS})
    return open_store(path, host_slots=2)


def read(store: Store, count: int = NUM_BLOCKS) -> list[Outcome]:
    """Fetch the stream's blocks; what is a hit holds the right bytes."""
    requests = [FetchRequest(block_key(number), empty_slot()) for number in range(count)]
    outcomes = store.fetch(requests).outcomes
    for number, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
        assert not outcome.is_hit or same_block(request.slot, make_slot(number)), f"block {number} holds other bytes"
    return outcomes


def check_sound(store: Store, count: int = NUM_BLOCKS) -> None:
    """All is there, and no byte is lost."""
    assert all(outcome.is_hit for outcome in read(store, count))
    report = store.verify()
    assert report.is_clean, report
    assert report.account is not None
    assert report.account.unaccounted_nbytes == 0


def put_in_vain(store: Store, number: int) -> None:
    """Put one block while the disk fails: not stored, whether the store says so by an error or by an outcome."""
    with suppress(KVStoreError):
        store.put([block_key(number)], [make_slot(number)], [40])
    assert store._disk.look_up([block_key(number)], [False]) == [None]


def append_in_vain(store: Store, expected: type[KVStoreError]) -> None:
    """Append while the disk fails: the error surfaces, and the stream stands where it stood."""
    store.append("lecture", make_blocks(2, NUM_BLOCKS), {"next": NUM_BLOCKS + 2})
    with pytest.raises(expected):
        store.flush()
    assert store.manifest("lecture").cursor == {"next": NUM_BLOCKS}


def append_again(store: Store) -> None:
    """After the fault: go on from the cursor."""
    store.append("lecture", make_blocks(2, NUM_BLOCKS), {"next": NUM_BLOCKS + 2})
    store.flush()
    check_sound(store, NUM_BLOCKS + 2)


def reads_that_fail_cost_their_blocks_while_they_fail(path: Path) -> None:
    with stored(path) as store:
        with faults(extents=True, read_errno=EIO):
            assert not any(outcome.is_hit for outcome in read(store))
            assert len(store.verify().faults) == NUM_BLOCKS
            assert Compactor(store._disk, store._pool).run().moved_blocks == 0
        check_sound(store)


def transfers_that_stop_short_are_finished(path: Path) -> None:
    with stored(path) as store, faults(extents=True, is_short=True):
        assert all(outcome.is_hit for outcome in read(store))
        append_again(store)
        assert store.verify().is_clean


def transfers_that_a_kernel_gives_back_are_finished(path: Path) -> None:
    with stored(path) as store, faults(extents=True, is_fickle=True):
        for first in range(NUM_BLOCKS, NUM_BLOCKS + 60, 20):
            store.append("lecture", make_blocks(20, first), {"next": first + 20})
        store.flush()
        check_sound(store, NUM_BLOCKS + 60)


def extents_that_cannot_be_written_are_no_blocks(path: Path) -> None:
    with stored(path) as store:
        for number, expected in ((EIO, StoreIOError), (ENOSPC, CapacityError), (EROFS, StoreIOError)):
            with faults(extents=True, write_errno=number):
                append_in_vain(store, expected)
                put_in_vain(store, 100)
                assert all(outcome.is_hit for outcome in read(store))
            check_sound(store)
        append_again(store)


def extents_that_cannot_be_synced_are_no_blocks(path: Path) -> None:
    with stored(path) as store:
        with faults(extents=True, sync_errno=EIO):
            append_in_vain(store, StoreIOError)
            put_in_vain(store, 100)
        append_again(store)
    with open_store(path) as store:
        check_sound(store, NUM_BLOCKS + 2)


def a_catalogue_that_cannot_be_written_stays_as_it_is(path: Path) -> None:
    with stored(path) as store:
        for number, expected in ((EIO, StoreIOError), (ENOSPC, CapacityError), (EROFS, ReadOnlyError)):
            with faults(catalogue=True, write_errno=number):
                append_in_vain(store, expected)
                put_in_vain(store, 100)
                with pytest.raises(expected):
                    store.remove_stream("lecture")
                assert all(outcome.is_hit for outcome in read(store))
            check_sound(store)
        append_again(store)
    with open_store(path) as store:
        check_sound(store, NUM_BLOCKS + 2)


def a_catalogue_that_cannot_be_synced_loses_nothing(path: Path) -> None:
    with stored(path) as store:
        with faults(catalogue=True, sync_errno=EIO):
            append_in_vain(store, StoreIOError)
        append_again(store)
    with open_store(path) as store:
        check_sound(store, NUM_BLOCKS + 2)


def a_compaction_that_cannot_write_moves_nothing(path: Path) -> None:
    with stored(path) as store:
        keys = [block_key(number) for number in range(100, 110)]
        store.put(keys, [make_slot(number) for number in range(100, 110)], [40] * 10)
        store.remove(keys[:7])
        for concerned in ({"extents": True}, {"catalogue": True}):
            with faults(**concerned, write_errno=EIO), pytest.raises(StoreIOError):
                Compactor(store._disk, store._pool).run()
            check_sound(store)
        assert Compactor(store._disk, store._pool).run().moved_blocks > 0
        check_sound(store)


def a_stalled_read_ends_with_the_right_bytes_and_holds_up_nobody_else(path: Path) -> None:
    with stored(path) as store, faults(extents=True, read_stall_ms=int(1000 * STALL_S)):
        outcomes: list[Outcome] = []
        reader = threading.Thread(target=lambda: outcomes.extend(read(store, 2)))
        began_s = time.monotonic()
        reader.start()
        assert len(store.manifest("lecture").entries) == NUM_BLOCKS
        assert store.exists([block_key(0), block_key(99)]) == [True, False]
        store.append("lecture", make_blocks(2, NUM_BLOCKS), {"next": NUM_BLOCKS + 2})
        assert time.monotonic() - began_s < STALL_S, "these need no read"
        reader.join(PATIENCE_S)
        assert time.monotonic() - began_s >= STALL_S
        assert len(outcomes) == 2
        assert all(outcome.is_hit for outcome in outcomes)
        store.flush()


def a_stalled_write_ends_and_readers_go_on_meanwhile(path: Path) -> None:
    with stored(path) as store:
        with faults(extents=True, write_stall_ms=2000):
            began_s = time.monotonic()
            store.append("lecture", make_blocks(1, NUM_BLOCKS), {"next": NUM_BLOCKS + 1})
            assert all(outcome.is_hit for outcome in read(store))
            assert time.monotonic() - began_s < 2, "neither call waits for the write"
            store.flush()
            assert 2 <= time.monotonic() - began_s < PATIENCE_S
        check_sound(store, NUM_BLOCKS + 1)


def a_stalled_sync_holds_back_the_acknowledgement(path: Path) -> None:
    with stored(path) as store:
        with faults(catalogue=True, sync_stall_ms=2000):
            began_s = time.monotonic()
            store.append("lecture", make_blocks(1, NUM_BLOCKS), {"next": NUM_BLOCKS + 1})
            assert all(outcome.is_hit for outcome in read(store))
            assert time.monotonic() - began_s < 2
            store.flush()
            assert time.monotonic() - began_s >= 2
        check_sound(store, NUM_BLOCKS + 1)


def a_writer_that_dies_of_its_disk_leaves_a_sound_store(path: Path) -> None:
    store = stored(path)
    with faults(extents=True, catalogue=True, write_errno=EIO, sync_errno=EIO):
        store.append("lecture", make_blocks(2, NUM_BLOCKS), {"next": NUM_BLOCKS + 2})
        with pytest.raises(KVStoreError):
            store.close()
    with open_store(path, Access.READ) as store:
        check_sound(store)


SCENARIOS: list[Callable[[Path], None]] = [
    reads_that_fail_cost_their_blocks_while_they_fail,
    transfers_that_stop_short_are_finished,
    transfers_that_a_kernel_gives_back_are_finished,
    extents_that_cannot_be_written_are_no_blocks,
    extents_that_cannot_be_synced_are_no_blocks,
    a_catalogue_that_cannot_be_written_stays_as_it_is,
    a_catalogue_that_cannot_be_synced_loses_nothing,
    a_compaction_that_cannot_write_moves_nothing,
    a_stalled_read_ends_with_the_right_bytes_and_holds_up_nobody_else,
    a_stalled_write_ends_and_readers_go_on_meanwhile,
    a_stalled_sync_holds_back_the_acknowledgement,
    a_writer_that_dies_of_its_disk_leaves_a_sound_store,
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Runs a scenario in a child of one process on the faulty disk; returns `ok`, or its traceback."""
    scratch = tmp_path_factory.mktemp("faulty")
    roots = [str(Path(kvstore.__file__).parents[1]), str(Path(__file__).parents[1])]
    with subprocess.Popen(
        [sys.executable, __file__, str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **build(scratch), "PYTHONPATH": os.pathsep.join(roots)},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run(name: str) -> str:
            stdin.write(name + "\n")
            stdin.flush()
            return stdout.readline().strip().replace("\\n", "\n")

        yield run
        stdin.close()


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_on_a_faulty_disk(scenario: str, engine: str, results: Callable[[str], str]) -> None:
    said = results(f"{scenario} {engine}")
    if said == NO_RING:
        pytest.skip(said)
    assert said == OK


def serve(scratch: Path) -> None:
    """Fork a child for each scenario that is asked for."""
    scenarios = {scenario.__name__: scenario for scenario in SCENARIOS}
    for line in sys.stdin:
        name, engine = line.split()
        child = os.fork()
        if child == 0:
            signal.alarm(int(2 * PATIENCE_S))  # whoever hangs is killed, and the test says so
            try:
                setattr(kvstore.store, "IoPool", partial(IoPool, engine=engine))  # noqa: B010 - a type to mypy
                folder = scratch / f"{name}-{engine}"
                folder.mkdir()
                scenarios[name](folder)
            except ConfigError as error:
                if "there is no io_uring here" not in str(error):
                    raise
                os.write(1, f"{NO_RING}\n".encode())
                os._exit(0)
            finally:
                said = OK if sys.exc_info()[0] is None else traceback.format_exc()
                os.write(1, (said.replace("\n", "\\n") + "\n").encode())
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status != 0:
            os.write(1, f"ended with status {status}\n".encode())


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
