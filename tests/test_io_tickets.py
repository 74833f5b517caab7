# SPDX-License-Identifier: Apache-2.0
"""Tickets: which ops failed, ends told one by one, time-outs, cancelling, and submit and wait in one call."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.errors import StoreIOError
from kvstore.native import Arena, DirectFile, IoPool

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def pool(engine: str) -> Iterator[IoPool]:
    pool = IoPool(2, engine)
    yield pool
    pool.close()


@pytest.fixture
def long_batch(tmp_path: Path) -> tuple[DirectFile, Arena, list[tuple[int, int, int]]]:
    """Reads that take far longer than asking about them: 4 GiB of a file without bytes, into one place."""
    path = tmp_path / "hollow"
    path.touch()
    os.truncate(path, 4096 * MIB)
    return DirectFile(str(path), writable=False), Arena(MIB, pinned=False), [(at * MIB, 0, MIB) for at in range(4096)]


def arena_of(data: bytes) -> Arena:
    arena = Arena(len(data), pinned=False)
    memoryview(arena)[: len(data)] = data
    return arena


def noise(nbytes: int) -> bytes:
    return os.urandom(nbytes)


def test_a_failed_op_takes_no_other_along_and_is_named(tmp_path: Path, pool: IoPool) -> None:
    data = noise(3 * PAGE)
    (tmp_path / "data").write_bytes(data)
    file = DirectFile(str(tmp_path / "data"), writable=False)
    arena = Arena(5 * PAGE, pinned=False)

    ops = [(0, 0, PAGE), (9 * PAGE, PAGE, PAGE), (PAGE, 2 * PAGE, PAGE), (2 * PAGE, 3 * PAGE, 2 * PAGE)]
    ticket = pool.submit_read(file, arena, ops)
    with pytest.raises(StoreIOError, match="at 36864: end of file after 0"):
        ticket.wait()
    pool.submit_read(file, arena, [(0, 4 * PAGE, PAGE)]).wait()

    errors = ticket.errors()
    assert sorted(errors) == [1, 3]
    assert all(isinstance(error, StoreIOError) for error in errors.values())
    assert "end of file after 4096" in str(errors[3])
    found = bytes(memoryview(arena))
    assert (found[:PAGE], found[2 * PAGE : 3 * PAGE], found[4 * PAGE :]) == (data[:PAGE], data[PAGE:-PAGE], data[:PAGE])


def test_a_long_op_that_fails_in_several_pieces_has_one_error(tmp_path: Path, pool: IoPool) -> None:
    file = DirectFile(str(tmp_path / "data"), writable=True)
    ticket = pool.submit_read(file, Arena(9 * MIB, pinned=False), [(0, 0, 9 * MIB)])

    with pytest.raises(StoreIOError, match="end of file"):
        ticket.wait()

    assert list(ticket.errors()) == [0]
    assert ticket.wait_some() == [0]


def test_ends_of_ops_are_told_once_each(tmp_path: Path, pool: IoPool) -> None:
    (tmp_path / "data").write_bytes(noise(20 * PAGE))
    file = DirectFile(str(tmp_path / "data"), writable=False)
    ticket = pool.submit_read(
        file, Arena(32 * PAGE, pinned=False), [(at * PAGE, at * PAGE, PAGE * (at % 3)) for at in range(32)]
    )

    told: list[int] = []
    while some := ticket.wait_some():
        told += some

    assert sorted(told) == list(range(32))
    assert sorted(ticket.errors()) == [at for at in range(20, 32) if at % 3]
    assert ticket.done()


def test_waiting_ends_with_the_time_and_cancelling_with_what_has_begun(
    pool: IoPool, long_batch: tuple[DirectFile, Arena, list[tuple[int, int, int]]]
) -> None:
    file, arena, ops = long_batch
    first = pool.submit_read(file, arena, ops)
    behind = pool.submit_read(file, arena, [(0, 0, 3 * MIB // 4 // PAGE * PAGE)])

    assert first.wait(0) is False
    assert first.wait(0.002) is False
    assert not first.done()
    behind.cancel()
    with pytest.raises(StoreIOError, match="cancelled") as raised:
        behind.wait(30)
    first.cancel()
    with pytest.raises(StoreIOError, match="cancelled"):
        first.wait(30)

    assert raised.value.errno == errno.ECANCELED
    cancelled = sorted(first.errors())
    assert cancelled == list(range(cancelled[0], len(ops)))
    assert pool.submit_read(file, arena, [(0, 0, MIB)]).wait(30) is True


def test_cancelling_what_has_ended_changes_nothing(tmp_path: Path, pool: IoPool) -> None:
    file = DirectFile(str(tmp_path / "data"), writable=True)
    ticket = pool.submit_write(file, arena_of(noise(PAGE)), [(0, 0, PAGE)])

    assert ticket.wait() is True
    ticket.cancel()

    assert ticket.wait(0) is True
    assert ticket.errors() == {}


@pytest.mark.parametrize("sizes", [[], [0], [PAGE], [MIB], [4 * MIB], [4 * MIB + PAGE], [PAGE, 2 * MIB, PAGE]])
def test_moving_and_waiting_in_one_call(tmp_path: Path, pool: IoPool, sizes: list[int]) -> None:
    data = noise(sum(sizes) + PAGE)
    file = DirectFile(str(tmp_path / "data"), writable=True)
    source, destination = arena_of(data), Arena(len(data), pinned=False)
    ops = [(sum(sizes[:number]), sum(sizes[:number]), nbytes) for number, nbytes in enumerate(sizes)]

    pool.write(file, source, ops)
    pool.read(file, destination, ops)

    assert bytes(memoryview(destination)) == data[:-PAGE] + bytes(PAGE)
    with pytest.raises(StoreIOError, match="end of file"):
        pool.read(file, destination, [(len(data), 0, PAGE)])
