# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while extents are read: memory that somebody still uses is lent to nobody else, and none of it is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvstore.native import IoPool, Ticket
from kvstore.tiers.extents import ExtentFiles
from kvstore.tiers.reading.extent_reader import ExtentReader
from kvstore.tiers.reading.plan import Piece
from kvstore.tiers.reading.staging import Staging

PAGE = 4096
HANG_S = 60.0
NUM_PAGES = 4096
SCATTERED = [Piece(number, 0, 40 * number * PAGE, (40 * number + 1) * PAGE) for number in range(100)]
NUM_REGIONS = 4


class _Helpers(ThreadPoolExecutor):
    """Interrupts whoever has just submitted a job, when that job says so."""

    def __init__(self) -> None:
        super().__init__(2)
        self.is_at_work = threading.Event()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        super().submit(fn, *args, **kwargs)
        assert self.is_at_work.wait(HANG_S)
        raise KeyboardInterrupt


class _InterruptedPool:
    """Interrupts whoever has just submitted a read."""

    def __init__(self, pool: IoPool) -> None:
        self._pool = pool

    def submit_read(self, *args: Any) -> Ticket:
        self._pool.submit_read(*args)
        raise KeyboardInterrupt


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ExtentFiles]:
    pages = b"".join(number.to_bytes(PAGE, "little") for number in range(NUM_PAGES))
    (tmp_path / "00000000.extents").write_bytes(pages)
    found = ExtentFiles(tmp_path, writable=False)
    yield found
    found.close()


def _page_at(reader: ExtentReader, start: int) -> int:
    return int.from_bytes(memoryview(reader.memory)[start : start + PAGE], "little")


def _read(reader: ExtentReader, pieces: Sequence[Piece]) -> dict[int, int]:
    """Number of the page that every piece was found to be."""
    found: dict[int, int] = {}

    def consume(placed: Sequence[tuple[Piece, int]]) -> None:
        found.update({piece.item: _page_at(reader, start) for piece, start in placed})

    reader.read([pieces], consume, lambda piece, error: None)
    return found


def test_memory_that_a_helper_reads_from_is_not_lent_after_an_interrupt(files: ExtentFiles) -> None:
    seen: list[bool] = []
    go_on = threading.Event()
    with _Helpers() as helpers:
        reader = ExtentReader(files, IoPool(1), helpers, 1, PAGE)
        reader.pace.byte_s = 1e-6

        def consume(placed: Sequence[tuple[Piece, int]]) -> None:
            helpers.is_at_work.set()
            go_on.wait(HANG_S)
            seen.append(all(_page_at(reader, start) == piece.start // PAGE for piece, start in placed))

        with pytest.raises(KeyboardInterrupt):
            reader.read([SCATTERED], consume, lambda piece, error: None)
        reader.pace.byte_s = 1e-12
        for first in range(5):  # other pages take all the memory there is
            others = [Piece(n, 0, start * PAGE, (start + 1) * PAGE) for n, start in enumerate(range(first, 4000, 17))]
            assert _read(reader, others) == {piece.item: piece.start // PAGE for piece in others}
        go_on.set()
    assert seen
    assert all(seen)
    assert reader._staging.num_free == NUM_REGIONS, "it goes back when the helper is done"


@pytest.mark.parametrize("count", [1, 100])
def test_no_memory_is_lost_when_its_release_is_interrupted(
    files: ExtentFiles, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    release = Staging.release
    for is_before in (True, False):
        with ThreadPoolExecutor(1) as helpers:
            reader = ExtentReader(files, IoPool(1), helpers, 0, PAGE)
            is_armed = True

            def interrupted(self: Staging, region: Any, is_before: bool = is_before) -> None:
                nonlocal is_armed
                if is_before and is_armed:
                    is_armed = False
                    raise KeyboardInterrupt
                release(self, region)
                if is_armed:
                    is_armed = False
                    raise KeyboardInterrupt

            monkeypatch.setattr(Staging, "release", interrupted)
            with pytest.raises(KeyboardInterrupt):
                _read(reader, SCATTERED[:count])
            assert not is_armed
            assert reader._staging.num_free == NUM_REGIONS
            assert len(_read(reader, SCATTERED)) == len(SCATTERED)


def test_memory_is_free_when_a_submission_was_interrupted(files: ExtentFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as helpers:
        reader = ExtentReader(files, IoPool(1), helpers, 0, PAGE)
        with monkeypatch.context() as patched:
            patched.setattr(reader, "_pool", _InterruptedPool(reader._pool))
            for _ in range(NUM_REGIONS + 1):
                with pytest.raises(KeyboardInterrupt):
                    _read(reader, SCATTERED)
        assert len(_read(reader, SCATTERED)) == len(SCATTERED)
