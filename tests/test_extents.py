# SPDX-License-Identifier: Apache-2.0
"""Free space of extent files: arithmetic, growth, budgets, what a crash leaves behind."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import CorruptRecordError
from kvstore.layout import ALIGNMENT
from kvstore.tiers.base import Extent
from kvstore.tiers.extents import ExtentFiles
from kvstore.tiers.placing.allocator import MIN_STEP_NBYTES, ExtentAllocator
from kvstore.tiers.placing.free_space import FreeSpace


def test_an_empty_range_has_nothing_to_give() -> None:
    assert FreeSpace().allocate(1) is None


def test_the_lowest_address_that_fits_is_taken() -> None:
    space = FreeSpace.around([(10, 10), (25, 10)], 100)
    assert [space.allocate(size) for size in (11, 5, 10, 1)] == [35, 0, 46, 5]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_released_neighbours_become_one_range(order: tuple[int, ...]) -> None:
    space = FreeSpace(30)
    offsets = [space.allocate(10) for _ in range(3)]
    for position in order:
        offset = offsets[position]
        assert offset is not None
        space.release(offset, 10)
    assert space.ranges() == [(0, 30)]


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 5), (4, 10), (19, 2), (99, 2), (-1, 3)])
def test_releasing_what_is_free_or_outside_is_refused(offset: int, nbytes: int) -> None:
    space = FreeSpace.around([(5, 15)], 100)
    with pytest.raises(CorruptRecordError):
        space.release(offset, nbytes)


def test_the_tail_can_be_cut_off() -> None:
    space = FreeSpace.around([(0, 10), (20, 10)], 50)
    assert space.tail_nbytes == 20
    assert space.cut_tail() == 30
    assert (space.tail_nbytes, space.free_nbytes, space.used_nbytes) == (0, 10, 20)


def test_used_ranges_behind_the_end_lengthen_the_range() -> None:
    space = FreeSpace.around([(0, 10), (90, 20)], 50)
    assert (space.nbytes, space.ranges()) == (110, [(10, 80)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 100)), max_size=80), st.integers(2, 5))
def test_no_byte_has_two_owners_and_none_is_lost(steps: list[tuple[bool, int, int]], bucket_ranges: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvstore.tiers.placing.free_space._MAX_BUCKET_RANGES", bucket_ranges)
        _check_free_space(steps)


def _check_free_space(steps: list[tuple[bool, int, int]]) -> None:
    space = FreeSpace(200)
    owned: list[tuple[int, int]] = []
    free = space.ranges()
    for is_allocation, nbytes, choice in steps:
        if is_allocation:
            offset = space.allocate(nbytes)
            fitting = [start for start, size in free if size >= nbytes]
            assert offset == (fitting[0] if fitting else None), "the lowest that fits"
            if offset is not None:
                owned.append((offset, nbytes))
        elif owned:
            space.release(*owned.pop(choice % len(owned)))
        pieces = sorted(owned + space.ranges())
        assert [offset for offset, _ in pieces] == [0, *(offset + size for offset, size in pieces)][: len(pieces)]
        assert sum(size for _, size in pieces) == 200
        free = space.ranges()
        assert all(a + size < b for (a, size), (b, _) in pairwise(free)), "not joined"
        assert space.first_free == (free[0][0] if free else None)


@pytest.mark.parametrize(("below", "found"), [(None, 10), (21, 10), (20, 10), (19, None)])
def test_space_can_be_asked_for_in_front_of_a_place(below: int | None, found: int | None) -> None:
    space = FreeSpace.around([(0, 10), (30, 10)], 100)
    assert space.allocate(10, below) == found


def test_very_many_holes_are_searched_in_buckets() -> None:
    space = FreeSpace.around(((2 * page, 1) for page in range(100_000)), 200_000)
    assert space.allocate(2) is None
    space.release(150_000, 1)
    assert space.allocate(3) == 149_999
    assert space.allocate(1) == 1
    assert len(space.ranges()) == 100_000 - 3


def _allocator(folder: Path, allocated: list[Extent]) -> ExtentAllocator:
    return ExtentAllocator(ExtentFiles(folder, writable=True), allocated)


def test_a_small_store_stays_small_and_a_growing_one_grows_in_larger_steps(tmp_path: Path) -> None:
    allocator = _allocator(tmp_path, [])
    assert allocator.allocate(ALIGNMENT, None) == Extent(0, 0, ALIGNMENT)
    assert allocator.file_nbytes == MIN_STEP_NBYTES
    assert allocator.allocate(MIN_STEP_NBYTES, None) == Extent(0, ALIGNMENT, MIN_STEP_NBYTES)
    assert allocator.file_nbytes == 2 * MIN_STEP_NBYTES
    assert (tmp_path / "00000000.extents").stat().st_size == 2 * MIN_STEP_NBYTES


@pytest.mark.parametrize(("limit", "fits"), [(2 * ALIGNMENT, True), (2 * ALIGNMENT - 1, False)])
def test_the_budget_limits_the_files_to_the_byte(tmp_path: Path, limit: int, fits: bool) -> None:
    allocator = _allocator(tmp_path, [])
    assert (allocator.allocate(2 * ALIGNMENT, limit) is not None) is fits
    assert allocator.file_nbytes == (2 * ALIGNMENT if fits else 0)


def test_what_the_catalogue_does_not_name_is_free_after_reopening(tmp_path: Path) -> None:
    first = _allocator(tmp_path, [])
    extents = [first.allocate(ALIGNMENT, None) for _ in range(4)]
    kept = extents[2]
    assert kept is not None
    second = _allocator(tmp_path, [kept])
    assert second.used_nbytes == ALIGNMENT
    assert second.free_ranges() == {0: [(0, 2 * ALIGNMENT), (3 * ALIGNMENT, MIN_STEP_NBYTES - 3 * ALIGNMENT)]}


def test_a_missing_or_short_file_does_not_stop_the_store_from_opening(tmp_path: Path) -> None:
    allocator = _allocator(tmp_path, [Extent(0, 8 * ALIGNMENT, ALIGNMENT), Extent(3, 0, ALIGNMENT)])
    assert allocator.used_nbytes == 0
    assert allocator.allocate(8 * ALIGNMENT, None) == Extent(4, 0, 8 * ALIGNMENT), "not in the place of a missing one"


def test_trimming_gives_free_tails_back_to_the_file_system(tmp_path: Path) -> None:
    allocator = _allocator(tmp_path, [])
    kept = allocator.allocate(ALIGNMENT, None)
    dropped = allocator.allocate(4 * MIN_STEP_NBYTES, None)
    assert kept is not None
    assert dropped is not None
    allocator.release([dropped])
    allocator.trim(MIN_STEP_NBYTES)
    assert (tmp_path / "00000000.extents").stat().st_size == ALIGNMENT
    assert allocator.allocate(ALIGNMENT, None) == Extent(0, ALIGNMENT, ALIGNMENT)


def test_blocks_of_many_sizes_that_come_and_go_leave_most_of_the_file_in_use() -> None:
    """Least recently used leaves first, in steps of 1/64, with random uses between: as a full store does it."""
    rng = random.Random(1)
    pages = 256 * 500
    space = FreeSpace(pages)
    held: dict[int, tuple[int, int]] = {}
    least = pages
    for number in range(12_000):
        size = rng.randint(1, 256)
        while (offset := space.allocate(size)) is None:
            freed = 0
            while freed < max(size, space.used_nbytes // 64):
                gone = held.pop(next(iter(held)))
                space.release(*gone)
                freed += gone[1]
        held[number] = (offset, size)
        for used in (rng.randrange(max(0, number - 1500), number + 1) for _ in range(2)):
            if used in held:
                held[used] = held.pop(used)
        if number > 3000:
            least = min(least, space.used_nbytes)
    assert least > 0.85 * pages
