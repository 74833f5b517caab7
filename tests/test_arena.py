# SPDX-License-Identifier: Apache-2.0
"""Arena: aligned, zero-filled, shared without copies, and there as long as a view is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvstore.errors import ShapeError
from kvstore.native import Arena, build_info

PAGE = 4096
HUGE_PAGE = 2 << 20


def resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.parametrize(("asked", "given"), [(1, PAGE), (PAGE - 1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)])
def test_sizes_are_rounded_up_to_pages(asked: int, given: int) -> None:
    arena = Arena(asked, pinned=False)

    assert arena.nbytes == given
    assert memoryview(arena).nbytes == given


@pytest.mark.parametrize("nbytes", [PAGE, 1 << 20, 4 << 20])
def test_memory_is_page_aligned_and_zero(nbytes: int) -> None:
    tensor = torch.frombuffer(Arena(nbytes, pinned=False), dtype=torch.uint8)

    assert tensor.data_ptr() % PAGE == 0
    assert not tensor.any()


@pytest.mark.parametrize("nbytes", [HUGE_PAGE, HUGE_PAGE + PAGE, 5 * HUGE_PAGE - PAGE])
def test_large_memory_begins_with_a_huge_page(nbytes: int) -> None:
    arenas = [Arena(nbytes, pinned=False) for _ in range(3)]

    for arena in arenas:
        tensor = torch.frombuffer(arena, dtype=torch.uint8)
        assert tensor.data_ptr() % HUGE_PAGE == 0
        tensor[-1] = 1
        assert arena.nbytes == nbytes


def test_all_views_share_the_memory() -> None:
    arena = Arena(PAGE, pinned=False)
    view, tensor = memoryview(arena), torch.frombuffer(arena, dtype=torch.uint8)

    view[7] = 9
    tensor[8] = 10

    assert view.format == "B"
    assert not view.readonly
    assert (int(tensor[7]), view[8]) == (9, 10)


def test_a_view_keeps_the_memory_alive() -> None:
    tensor = torch.frombuffer(Arena(1 << 20, pinned=False), dtype=torch.uint8)
    tensor.fill_(3)

    assert int(tensor.sum()) == 3 << 20


def test_the_pages_go_with_the_last_view() -> None:
    arena = Arena(64 << 20, pinned=False)
    tensor = torch.frombuffer(arena, dtype=torch.uint8)
    tensor.fill_(1)
    part = memoryview(arena)[:PAGE]
    full = resident_nbytes()

    del arena, tensor
    assert bytes(part) == b"\1" * PAGE
    del part

    assert full - resident_nbytes() > 60 << 20


@pytest.mark.parametrize("nbytes", [0, (1 << 48) + 1])
def test_sizes_out_of_range_are_refused(nbytes: int) -> None:
    with pytest.raises(ShapeError):
        Arena(nbytes, pinned=False)


def test_pinning_is_what_the_machine_allows() -> None:
    arena = Arena(1 << 20, pinned=True)

    assert arena.is_pinned == (build_info()["cuda_devices"] > 0)
    assert not Arena(1 << 20, pinned=False).is_pinned
