# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda on a real device: row moves against their host twins bit for bit, queued copies, pinned memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.layout import BlockLayout
from kvstore.native import (
    Arena,
    Geometry,
    build_info,
    copy_to_device,
    copy_to_host,
    device_gather_rows,
    device_scatter_rows,
    gather_rows,
    scatter_rows,
)
from kvstore.spec import ModelSpec
from kvstore.tiers.device.copies import copy_costs
from kvstore.tiers.device.link import link_to
from kvstore.tiers.device.pool import DevicePool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        build_info()["cuda_devices"] == 0, reason="the native part sees no device, or was built without"
    ),
]

NUM_SLOTS = 5
# Key rows of 16 bytes move in 16-byte words, value rows of 12 bytes in 2-byte words.
GEOMETRY = Geometry(num_layers=3, kv_heads=2, key_dim=8, value_dim=6, itemsize=2, block_tokens=300)
KV_HEADS = 2


def row_nbytes(plane: int) -> int:
    return KV_HEADS * 2 * (6 if plane % 2 else 8)


def random_bytes(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def make_table(slots: list[int], counts: list[int]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.tensor(slots, dtype=torch.int32), starts


def place_of(tensor: Tensor) -> tuple[int, int]:
    """(address, nbytes), as the native part takes device memory."""
    return tensor.data_ptr(), tensor.nbytes


def move_rows(move: Callable[..., None], plane: int, arrays: list[Tensor], stream: torch.cuda.Stream) -> int:
    """Move rows between pool and dense, by block table and row starts, all on the device; returns the status word."""
    pool, slots, row_starts, dense = (place_of(part) for part in arrays)
    status = torch.zeros(1, dtype=torch.int32, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    move(GEOMETRY, plane, pool, slots, row_starts, dense, status.data_ptr(), stream.cuda_stream)
    stream.synchronize()
    return int(status.item())


@pytest.fixture
def stream() -> torch.cuda.Stream:
    """A stream of our own; a test lets it wait for torch's before the first use."""
    return torch.cuda.Stream()


TABLES = [
    pytest.param([2], [1], id="one row"),
    pytest.param([4, 0, 3], [300, 0, 17], id="full, empty and short"),
    pytest.param([1, 1], [255, 257], id="one slot twice"),
    pytest.param([], [], id="no blocks"),
]


@pytest.mark.parametrize("plane", [0, 3, 4])
@pytest.mark.parametrize(("slots", "counts"), TABLES)
def test_gather_equals_its_host_twin(
    plane: int, slots: list[int], counts: list[int], stream: torch.cuda.Stream
) -> None:
    pool = random_bytes(1, NUM_SLOTS, GEOMETRY.slot_nbytes)
    table, starts = make_table(slots, counts)
    dense = torch.zeros(sum(counts), row_nbytes(plane), dtype=torch.uint8)
    gather_rows(GEOMETRY, plane, pool.numpy().data, table.numpy().data, starts.numpy().data, dense.numpy().data)

    arrays = [part.cuda() for part in (pool, table, starts, torch.zeros_like(dense))]

    assert move_rows(device_gather_rows, plane, arrays, stream) == 0
    assert torch.equal(arrays[3].cpu(), dense)


@pytest.mark.parametrize("plane", [0, 3, 4])
def test_scatter_equals_its_host_twin(plane: int, stream: torch.cuda.Stream) -> None:
    pool = random_bytes(1, NUM_SLOTS, GEOMETRY.slot_nbytes)
    table, starts = make_table([3, 0, 4], [300, 2, 129])
    dense = random_bytes(2, 431, row_nbytes(plane))
    on_device = pool.cuda()
    scatter_rows(GEOMETRY, plane, pool.numpy().data, table.numpy().data, starts.numpy().data, dense.numpy().data)

    arrays = [on_device, table.cuda(), starts.cuda(), dense.cuda()]

    assert move_rows(device_scatter_rows, plane, arrays, stream) == 0
    assert torch.equal(on_device.cpu(), pool)


@pytest.mark.parametrize(
    ("slots", "counts"),
    [
        pytest.param([NUM_SLOTS], [2], id="slot behind the pool"),
        pytest.param([-1], [2], id="negative slot"),
        pytest.param([0], [301], id="more rows than a slot"),
    ],
)
def test_a_bad_table_entry_moves_nothing_and_is_reported(
    slots: list[int], counts: list[int], stream: torch.cuda.Stream
) -> None:
    table, starts = make_table(slots, counts)
    pool = random_bytes(1, NUM_SLOTS, GEOMETRY.slot_nbytes).cuda()
    dense = torch.full((counts[0], row_nbytes(0)), 7, dtype=torch.uint8, device="cuda")
    arrays = [pool, table.cuda(), starts.cuda(), dense]
    assert move_rows(device_gather_rows, 0, arrays, stream) == 1
    assert bool((dense == 7).all())


UNEVEN = [(0, 4096, 1000), (1000, 5096, 24), (8192, 0, 1), (9000, 9000, 0)]
EVEN = [(0, 4096, 16), (64, 8192, 20480), (32768, 32768, 4096), (40960, 0, 4080)]


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("runs", [UNEVEN, EVEN, UNEVEN[:1], []])
def test_copies_come_back_as_they_went(
    pinned: bool, by_kernel: bool, runs: list[tuple[int, int, int]], stream: torch.cuda.Stream
) -> None:
    source, target = Arena(1 << 16, pinned=pinned), Arena(1 << 16, pinned=pinned)
    sent, received = (torch.frombuffer(arena, dtype=torch.uint8) for arena in (source, target))
    sent.copy_(random_bytes(3, 1 << 16))
    on_device = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())

    copy_to_device(source, place_of(on_device), runs, by_kernel, stream.cuda_stream)
    copy_to_host(place_of(on_device), target, runs, by_kernel, stream.cuda_stream)
    stream.synchronize()

    wanted = torch.zeros_like(sent)
    for host, device, nbytes in runs:
        wanted[host : host + nbytes] = sent[host : host + nbytes]
        assert torch.equal(on_device[device : device + nbytes].cpu(), sent[host : host + nbytes])
    assert torch.equal(received, wanted)


@pytest.mark.parametrize("run", [(0, 4000, 97), (4000, 0, 97), (0, (1 << 64) - 1, 2)])
def test_a_copy_outside_its_buffers_is_refused(run: tuple[int, int, int], stream: torch.cuda.Stream) -> None:
    host = torch.zeros(4096, dtype=torch.uint8)
    on_device = torch.zeros(4096, dtype=torch.uint8, device="cuda")
    with pytest.raises(ShapeError):
        copy_to_device(host.numpy().data, place_of(on_device), [(0, 0, 1), run], False, stream.cuda_stream)


def test_the_default_stream_is_refused() -> None:
    on_device = torch.zeros(4096, dtype=torch.uint8, device="cuda")
    with pytest.raises(ShapeError, match="default stream"):
        copy_to_device(torch.ones(1).numpy().data, place_of(on_device), [(0, 0, 1)], False, 0)


def test_a_pinned_arena_is_known_to_the_driver() -> None:
    arena = Arena(1 << 20, pinned=True)
    assert arena.is_pinned
    assert torch.frombuffer(arena, dtype=torch.uint8).is_pinned()
    assert not torch.frombuffer(Arena(1 << 20, pinned=False), dtype=torch.uint8).is_pinned()


def test_more_small_runs_than_a_kernel_takes_come_back(stream: torch.cuda.Stream) -> None:
    count, nbytes = 2500, 4096
    source = Arena(2 * count * nbytes, pinned=True)
    sent = torch.frombuffer(source, dtype=torch.uint8)
    sent.copy_(random_bytes(4, sent.numel()))
    runs = [(2 * at * nbytes, (count - 1 - at) * nbytes, nbytes) for at in range(count)]
    on_device = torch.zeros(count * nbytes, dtype=torch.uint8, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())

    copy_to_device(source, place_of(on_device), runs, True, stream.cuda_stream)
    stream.synchronize()

    assert torch.equal(on_device.cpu().view(count, nbytes).flip(0), sent.view(count, 2, nbytes)[:, 0])


def test_a_link_brings_layers_and_takes_slots() -> None:
    layout = BlockLayout(ModelSpec(4, 2, 8, 8, "bfloat16", "pre", "test", "{}", "0"), 16)
    pool = DevicePool(layout, 40, torch.device("cuda"))
    pool.memory.zero_()
    link = link_to(pool)
    wanted = random_bytes(5, 40, layout.slot_nbytes)
    per_layer = layout.block_tokens * layout.spec.token_nbytes // 4
    for first in range(0, 40, 10):  # more batches than halves
        for slot, block in zip(link.stage(range(first, first + 10)), wanted[first : first + 10], strict=True):
            slot.copy_(block)
        link.send([index != 3 for index in range(10)], range(1, 3))

    for slot_idx in range(40):
        taken = link.take(slot_idx)
        expected = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
        if slot_idx % 10 != 3:
            expected[per_layer : 3 * per_layer] = wanted[slot_idx, per_layer : 3 * per_layer]
        assert torch.equal(taken, expected)


@pytest.mark.parametrize("to_device", [False, True])
def test_measured_costs_are_those_of_a_bus(to_device: bool) -> None:
    costs = copy_costs(torch.cuda.current_device(), to_device=to_device)

    assert 1e-8 < costs.engine_run_s < 1e-3
    assert 1e-13 < costs.engine_byte_s < 1e-9
    assert not costs.prefers_kernel(1, 64 << 20)
