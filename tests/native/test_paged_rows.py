# SPDX-License-Identifier: Apache-2.0
"""gather_rows and scatter_rows on host memory, bit for bit against the layout's own views; and the device stubs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.errors import ConfigError, ShapeError, StoreIOError
from kvstore.layout import BlockLayout
from kvstore.native import Geometry, build_info, copy_to_device, copy_to_host, gather_rows, scatter_rows
from kvstore.spec import ModelSpec

LAYOUT = BlockLayout(ModelSpec(3, 2, 8, 6, "bfloat16", "pre", "llama", "{}", "0"), 4)
GEOMETRY = Geometry(3, 2, 8, 6, 2, 4)
NUM_SLOTS = 5


def make_pool() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (NUM_SLOTS, LAYOUT.slot_nbytes), generator=generator, dtype=torch.uint8)


def plane_view(slot: Tensor, plane: int) -> Tensor:
    """[heads, tokens, dim] int16 bits of one plane."""
    view = (LAYOUT.values if plane % 2 else LAYOUT.keys)(slot)
    return view.view(torch.int16)[plane // 2]


def tables(slots: list[int], counts: list[int]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.tensor(slots, dtype=torch.int32), starts


def reference(pool: Tensor, plane: int, slots: list[int], counts: list[int]) -> Tensor:
    """[num_rows, heads, dim]"""
    rows = [plane_view(pool[s], plane)[:, :n].transpose(0, 1) for s, n in zip(slots, counts, strict=True)]
    return torch.cat(rows).contiguous()


BLOCKS = st.lists(st.tuples(st.integers(0, NUM_SLOTS - 1), st.integers(0, 4)), min_size=1, max_size=8)


@settings(deadline=None)
@given(blocks=BLOCKS, plane=st.integers(0, 5))
def test_gather_equals_indexing(blocks: list[tuple[int, int]], plane: int) -> None:
    pool = make_pool()
    slots, counts = [slot for slot, _ in blocks], [count for _, count in blocks]
    expected = reference(pool, plane, slots, counts)
    dense = torch.zeros_like(expected)
    table, starts = tables(slots, counts)

    gather_rows(GEOMETRY, plane, pool.numpy().data, table.numpy().data, starts.numpy().data, dense.numpy().data)

    assert torch.equal(dense, expected)


@pytest.mark.parametrize("plane", range(6))
def test_scatter_writes_those_rows_and_no_other_byte(plane: int) -> None:
    pool = make_pool()
    slots, counts = [3, 0, 4], [4, 2, 1]
    dense = torch.arange(7 * 2 * (6 if plane % 2 else 8), dtype=torch.int16)
    table, starts = tables(slots, counts)
    expected = pool.clone()
    rows = dense.view(7, 2, -1)
    for slot, first, end in ((3, 0, 4), (0, 4, 6), (4, 6, 7)):
        plane_view(expected[slot], plane)[:, : end - first] = rows[first:end].transpose(0, 1)

    scatter_rows(GEOMETRY, plane, pool.numpy().data, table.numpy().data, starts.numpy().data, dense.numpy().data)

    assert torch.equal(pool, expected)


@pytest.mark.parametrize(
    ("plane", "slots", "starts", "num_rows"),
    [
        (6, [0], [0, 4], 4),
        (0, [-1], [0, 4], 4),
        (0, [NUM_SLOTS], [0, 4], 4),
        (0, [0], [0, 5], 5),
        (0, [0, 1], [0, 4, 3], 3),
        (0, [0], [1, 4], 4),
        (0, [0], [0, 4], 3),
        (0, [0], [0], 0),
        (0, [0], [0, 4, 8], 8),
        (0, [0], [0, -(2**31)], 4),
    ],
)
def test_tables_that_do_not_fit_are_refused(plane: int, slots: list[int], starts: list[int], num_rows: int) -> None:
    pool, dense = make_pool(), torch.zeros(num_rows, 2, 8, dtype=torch.int16)
    table, row_starts = torch.tensor(slots, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)

    with pytest.raises(ShapeError):
        gather_rows(GEOMETRY, plane, pool.numpy().data, table.numpy().data, row_starts.numpy().data, dense.numpy().data)
    assert not dense.any()


def test_the_native_geometry_is_the_layouts() -> None:
    assert GEOMETRY.slot_nbytes == LAYOUT.slot_nbytes


@pytest.mark.parametrize(
    "sizes", [(0, 1, 1, 1, 2, 1), (65536, 1, 1, 1, 2, 1), (1, 1, 1, 1, 3, 1), (1, 65535, 65535, 1, 2, 1)]
)
def test_geometries_beyond_the_limits_are_refused(sizes: tuple[int, int, int, int, int, int]) -> None:
    with pytest.raises(ShapeError):
        Geometry(*sizes)


def test_device_copies_without_a_device_are_refused() -> None:
    info = build_info()
    if info["cuda_devices"]:
        pytest.skip("this machine has a CUDA device")

    refusal = StoreIOError if info["has_cuda"] else ConfigError
    with pytest.raises(refusal):
        copy_to_device(bytes(16), (4096, 16), [(0, 0, 16)], False, 8)
    with pytest.raises(refusal):
        copy_to_host((4096, 16), bytearray(16), [(0, 0, 16)], False, 8)


def test_device_copies_check_ranges_and_streams_first() -> None:
    if not build_info()["has_cuda"]:
        pytest.skip("this build has no CUDA")

    for device, run, stream in [((4096, 16), (0, 0, 17), 8), ((4096, 15), (0, 0, 16), 8), ((4096, 16), (0, 0, 16), 0)]:
        with pytest.raises(ShapeError):
            copy_to_device(bytes(16), device, [run], False, stream)
