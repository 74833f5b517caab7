# SPDX-License-Identifier: Apache-2.0
"""Reading pieces of extent files: every byte to its piece, over several waves, and a bad piece alone fails."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.errors import KVStoreError, StoreIOError
from kvstore.native import IoPool
from kvstore.tiers.extents import ExtentFiles
from kvstore.tiers.reading.extent_reader import ExtentReader
from kvstore.tiers.reading.plan import Piece

PAGE = 4096
HANG_S = 60.0
FILE_NBYTES = 24 << 20  # more than all the memory to read to


class Reading:
    """A reader of two files of noise, and what it handed over."""

    def __init__(self, folder: Path, data: list[bytes], pool: IoPool, consumers: ThreadPoolExecutor) -> None:
        self.data = data
        self.reader = ExtentReader(ExtentFiles(folder, writable=False), pool, consumers, 2, 1 << 20)

    def read(self, pieces: list[Piece]) -> tuple[int, dict[int, bool], dict[int, KVStoreError]]:
        """Bytes read; by item, whether its bytes were right; by item, why it failed."""
        right: dict[int, bool] = {}
        failed: dict[int, KVStoreError] = {}

        memory = memoryview(self.reader.memory)

        def consume(placed: Sequence[tuple[Piece, int]]) -> None:
            for piece, start in placed:
                assert piece.item not in right
                data = memory[start : start + piece.end - piece.start]
                right[piece.item] = data == self.data[piece.file_id][piece.start : piece.end]

        nbytes = self.reader.read([pieces], consume, lambda piece, error: failed.update({piece.item: error}))
        return nbytes, right, failed


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """Two extent files, and what is in them."""
    folder = tmp_path_factory.mktemp("extents")
    data = [os.urandom(FILE_NBYTES) for _ in range(2)]
    for number, each in enumerate(data):
        (folder / f"{number:08d}.extents").write_bytes(each)
    return folder, data


@pytest.fixture
def reading(noise: tuple[Path, list[bytes]], engine: str) -> Iterator[Reading]:
    pool = IoPool(2, engine)
    with ThreadPoolExecutor(2) as consumers:
        found = Reading(*noise, pool, consumers)
        yield found
        found.reader.close()
    pool.close()


def run_guarded(call: Callable[[], object]) -> None:
    """Call it, and fail if it hangs or raises."""
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(bool(call() or True)), daemon=True)
    thread.start()
    thread.join(HANG_S)
    assert ended


def scattered(count: int, pages: int, seed: int) -> list[Piece]:
    chance = random.Random(seed)
    starts = [chance.randrange(FILE_NBYTES // PAGE - pages) * PAGE for _ in range(count)]
    return [Piece(item, item % 2, start, start + pages * PAGE) for item, start in enumerate(starts)]


@pytest.mark.parametrize(("count", "pages"), [(0, 1), (1, 1), (1, 256), (2, 3), (300, 1), (60, 37), (40, 256)])
def test_every_piece_is_consumed_once_with_its_bytes(reading: Reading, count: int, pages: int) -> None:
    nbytes, right, failed = reading.read(scattered(count, pages, count))

    assert right == dict.fromkeys(range(count), True)
    assert not failed
    assert (nbytes >= pages * PAGE) == (count > 0)


def test_batches_of_several_threads_share_the_memory(reading: Reading) -> None:
    found: list[dict[int, bool]] = []
    threads = [
        threading.Thread(target=lambda seed=seed: found.append(reading.read(scattered(50, 64, seed))[1]))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [dict.fromkeys(range(50), True)] * 4


@pytest.mark.parametrize("count", [1, 8])
def test_a_piece_that_cannot_be_read_fails_alone(reading: Reading, count: int) -> None:
    end = FILE_NBYTES
    pieces = [Piece(item, 0, end - item * PAGE, end - item * PAGE + PAGE) for item in range(count)]

    _, right, failed = reading.read(pieces)

    assert right == dict.fromkeys(range(1, count), True)
    assert list(failed) == [0]
    assert isinstance(failed[0], StoreIOError)


def test_a_missing_file_fails_its_pieces_only(reading: Reading) -> None:
    pieces = [Piece(item, item % 3, item * 100 * PAGE, (item * 100 + 1) * PAGE) for item in range(9)]

    _, right, failed = reading.read(pieces)

    assert right == {item: True for item in range(9) if item % 3 < 2}
    assert sorted(failed) == [2, 5, 8]


@pytest.mark.parametrize("count", [1, 4])
def test_a_file_that_cannot_even_be_looked_for_fails_its_pieces(reading: Reading, tmp_path: Path, count: int) -> None:
    (tmp_path / "00000002.extents").symlink_to("x" * 300)  # no such name can be
    files = ExtentFiles(tmp_path, writable=True)
    reader = ExtentReader(files, IoPool(2), ThreadPoolExecutor(1), 1, 1 << 20)
    failed: list[KVStoreError] = []

    for _ in range(6):  # more than there are regions to read to
        pieces = [Piece(item, 2, item * PAGE, (item + 1) * PAGE) for item in range(count)]
        run_guarded(lambda pieces=pieces: reader.read([pieces], print, lambda piece, error: failed.append(error)))  # type: ignore[misc]

    assert len(failed) == 6 * count
    assert all(isinstance(error, StoreIOError) and error.errno == errno.ENAMETOOLONG for error in failed)


def test_other_threads_help_a_slow_consumer_and_one_thread_takes_a_fast_one(reading: Reading) -> None:
    seen: set[int] = set()

    def consume(placed: Sequence[tuple[Piece, int]]) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.01)

    reading.reader.pace.byte_s = 1e-6
    reading.reader.read([scattered(60, 4, 5)], consume, lambda piece, error: None)
    assert threading.get_ident() in seen
    assert len(seen) > 1
    seen.clear()
    reading.reader.pace.byte_s = 1e-12
    reading.reader.read([scattered(60, 4, 5)], consume, lambda piece, error: None)
    assert seen == {threading.get_ident()}


def test_a_batch_may_come_in_parts(reading: Reading) -> None:
    right: list[int] = []
    pieces = scattered(9, 4, 6)

    def consume(placed: Sequence[tuple[Piece, int]]) -> None:
        right.extend(piece.item for piece, _ in placed)

    for parts in ([pieces[:4], pieces[4:]], [[], pieces], [pieces[:1], pieces[1:]], [pieces, []]):
        right.clear()
        reading.reader.read(iter(parts), consume, lambda piece, error: None)
        assert sorted(right) == list(range(9))
    assert reading.reader.read(iter([[], []]), consume, lambda piece, error: None) == 0


def test_a_batch_comes_where_no_helper_can_be_had(noise: tuple[Path, list[bytes]], engine: str) -> None:
    pool = IoPool(2, engine)
    with ThreadPoolExecutor(2) as consumers:
        reading = Reading(*noise, pool, consumers)

    right: list[dict[int, bool]] = []
    for _ in range(6):  # more than there are regions to read to
        run_guarded(lambda: right.append(reading.read(scattered(60, 64, 5))[1]))
    assert right == [dict.fromkeys(range(60), True)] * 6


@pytest.mark.parametrize("count", [1, 60])
def test_an_error_of_the_consumer_is_raised_and_leaves_the_reader_usable(reading: Reading, count: int) -> None:
    pieces = scattered(count, 64, 5)

    def consume(placed: Sequence[tuple[Piece, int]]) -> None:
        raise ZeroDivisionError

    for _ in range(6):
        with pytest.raises(ZeroDivisionError):
            reading.reader.read([pieces], consume, lambda piece, error: None)
    assert reading.read(pieces)[1] == dict.fromkeys(range(count), True)
