# SPDX-License-Identifier: Apache-2.0
"""DirectFile, IoPool and Ticket: bytes arrive where they should, faults arrive at wait(), and nothing hangs."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, ShapeError, StoreIOError
from kvstore.native import Arena, DirectFile, IoPool

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def pool(engine: str) -> Iterator[IoPool]:
    pool = IoPool(2, engine)
    yield pool
    pool.close()


def arena_of(data: bytes) -> Arena:
    arena = Arena(len(data), pinned=False)
    memoryview(arena)[: len(data)] = data
    return arena


def noise(nbytes: int) -> bytes:
    return os.urandom(nbytes)


@pytest.mark.parametrize("in_flight", [1, 2, 5])
@pytest.mark.parametrize("nbytes", [PAGE, MIB - PAGE, MIB, MIB + PAGE, 5 * MIB])
def test_what_is_written_is_read_back(tmp_path: Path, engine: str, in_flight: int, nbytes: int) -> None:
    data = noise(nbytes)
    source, destination = arena_of(data), Arena(nbytes, pinned=False)
    file = DirectFile(str(tmp_path / "data"), writable=True)
    pool = IoPool(in_flight, engine, in_flight)

    pool.submit_write(file, source, [(0, 0, nbytes)]).wait()
    pool.submit_read(file, destination, [(0, 0, nbytes)]).wait()
    pool.close()

    assert bytes(memoryview(destination)) == data
    assert (tmp_path / "data").read_bytes() == data
    assert file.size() == nbytes


def test_a_batch_moves_each_op_to_its_own_place_and_no_further(tmp_path: Path, pool: IoPool) -> None:
    pages = [noise(PAGE) for _ in range(4)]
    (tmp_path / "data").write_bytes(b"".join(pages))
    file = DirectFile(str(tmp_path / "data"), writable=False)
    arena = arena_of(b"\xa5" * 6 * PAGE)

    pool.submit_read(file, arena, [(3 * PAGE, 0, PAGE), (0, 4 * PAGE, PAGE), (PAGE, 2 * PAGE, PAGE)]).wait()

    guard = b"\xa5" * PAGE
    assert bytes(memoryview(arena)) == pages[3] + guard + pages[1] + guard + pages[0] + guard


def test_empty_batches_and_empty_ops_are_done_at_once(tmp_path: Path, pool: IoPool) -> None:
    file = DirectFile(str(tmp_path / "data"), writable=True)

    for ops in ([], [(0, 0, 0)], [(PAGE, PAGE, 0)]):
        ticket = pool.submit_read(file, Arena(PAGE, pinned=False), ops)
        assert ticket.done()
        ticket.wait()


def test_many_tickets_from_many_threads(tmp_path: Path, pool: IoPool) -> None:
    count = 32
    data = noise(count * PAGE)
    file = DirectFile(str(tmp_path / "data"), writable=True)
    source = arena_of(data)
    destination = Arena(count * PAGE, pinned=False)

    def move(first: int) -> None:
        for page in range(first, count, 4):
            at = page * PAGE
            pool.submit_write(file, source, [(at, at, PAGE)]).wait()
            pool.submit_read(file, destination, [(at, at, PAGE)]).wait()

    threads = [threading.Thread(target=move, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert bytes(memoryview(destination)) == data


def test_waiting_again_gives_the_same_answer(tmp_path: Path, pool: IoPool) -> None:
    file = DirectFile(str(tmp_path / "data"), writable=True)
    good = pool.submit_write(file, arena_of(noise(PAGE)), [(0, 0, PAGE)])
    bad = pool.submit_read(file, Arena(PAGE, pinned=False), [(PAGE, 0, PAGE)])

    good.wait()
    good.wait()
    for _ in range(2):
        with pytest.raises(StoreIOError, match="end of file"):
            bad.wait()
    assert good.done()
    assert bad.done()


@pytest.mark.parametrize("size", [0, 1, PAGE, PAGE + 5, 2 * PAGE - 1])
def test_reading_past_the_end_is_an_error_never_a_short_result(tmp_path: Path, pool: IoPool, size: int) -> None:
    (tmp_path / "data").write_bytes(noise(size))
    file = DirectFile(str(tmp_path / "data"), writable=False)

    with pytest.raises(StoreIOError, match="end of file"):
        pool.submit_read(file, Arena(2 * PAGE, pinned=False), [(0, 0, 2 * PAGE)]).wait()


def test_ranges_outside_the_buffer_are_refused(tmp_path: Path, pool: IoPool) -> None:
    file = DirectFile(str(tmp_path / "data"), writable=True)
    arena = Arena(2 * PAGE, pinned=False)

    for op in [(0, 0, 3 * PAGE), (0, PAGE, 2 * PAGE), (0, 2**64 - PAGE, 2 * PAGE), (2**63, 0, PAGE), (0, 3 * PAGE, 0)]:
        with pytest.raises(ShapeError):
            pool.submit_write(file, arena, [op])
    assert file.size() == 0


def test_direct_files_refuse_what_is_not_aligned(tmp_path: Path, pool: IoPool) -> None:
    (tmp_path / "data").write_bytes(noise(4 * PAGE))
    file = DirectFile(str(tmp_path / "data"), writable=False)
    if not file.is_direct:
        pytest.skip("the file system of the temporary folder has no O_DIRECT")
    arena = Arena(4 * PAGE, pinned=False)

    for op in [(1, 0, PAGE), (512, 0, PAGE), (0, 8, PAGE), (0, 0, PAGE - 1), (0, 0, 512)]:
        with pytest.raises(ShapeError, match="multiples of 4096"):
            pool.submit_read(file, arena, [op])
    with pytest.raises(ShapeError, match="multiples of 4096"):
        pool.submit_read(file, memoryview(arena)[1:], [(0, 0, PAGE)])


def test_unwritable_buffers_and_files_are_refused(tmp_path: Path, pool: IoPool) -> None:
    (tmp_path / "data").write_bytes(noise(PAGE))
    file = DirectFile(str(tmp_path / "data"), writable=False)

    with pytest.raises(ShapeError, match="writable"):
        pool.submit_read(file, bytes(PAGE), [(0, 0, PAGE)])
    with pytest.raises(ConfigError, match="reading only"):
        pool.submit_write(file, Arena(PAGE, pinned=False), [(0, 0, PAGE)])


def test_closing_the_file_lets_running_transfers_end(tmp_path: Path, pool: IoPool) -> None:
    data = noise(8 * MIB)
    file = DirectFile(str(tmp_path / "data"), writable=True)

    ticket = pool.submit_write(file, arena_of(data), [(0, 0, len(data))])
    file.close()
    ticket.wait()

    assert (tmp_path / "data").read_bytes() == data


def test_a_dropped_ticket_ends_its_transfers_first(tmp_path: Path, pool: IoPool) -> None:
    data = noise(8 * MIB)
    file = DirectFile(str(tmp_path / "data"), writable=True)

    # Neither ticket nor buffer has another owner.
    pool.submit_write(file, arena_of(data), [(0, 0, len(data))])
    gc.collect()

    assert (tmp_path / "data").read_bytes() == data


def test_a_ticket_keeps_its_buffer_until_the_transfers_have_ended(tmp_path: Path, pool: IoPool) -> None:
    (tmp_path / "data").write_bytes(noise(PAGE))
    buffer = bytearray(PAGE)
    file = DirectFile("/proc/self/status", writable=False)

    ticket = pool.submit_read(file, buffer, [(0, 0, 5)])
    with pytest.raises(BufferError):
        buffer.clear()
    ticket.wait()
    buffer.clear()


def test_closing_the_pool_ends_what_is_queued_and_refuses_more(tmp_path: Path, engine: str) -> None:
    data = noise(8 * MIB)
    pool = IoPool(1, engine, 1)
    file = DirectFile(str(tmp_path / "data"), writable=True)
    ticket = pool.submit_write(file, arena_of(data), [(0, 0, len(data))])

    pool.close()
    pool.close()

    assert ticket.done()
    ticket.wait()
    assert (tmp_path / "data").read_bytes() == data
    with pytest.raises(ConfigError, match="closed"):
        pool.submit_read(file, Arena(PAGE, pinned=False), [(0, 0, PAGE)])
