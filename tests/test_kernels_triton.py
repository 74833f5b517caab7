# SPDX-License-Identifier: Apache-2.0
"""Triton twins against their references: in Triton's interpreter where there is no GPU, compiled where there is one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from kvstore.kernels import dispatch, reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
HAS_GPU = torch.cuda.is_available()

maxsim_triton = pytest.importorskip("kvstore.kernels.maxsim_triton")
rotate_gather_triton = pytest.importorskip("kvstore.kernels.rotate_gather_triton")

INTERPRETED = pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled in this process, for the GPU")
COMPILED = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
DEVICES = [
    pytest.param("cpu", id="interpreter", marks=INTERPRETED),
    pytest.param("cuda", id="gpu", marks=[pytest.mark.gpu, COMPILED]),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])

BLOCK_TOKENS, NUM_SLOTS = 21, 6


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gather_inputs(
    sizes: list[int], key_dim: int, value_dim: int, dtype: torch.dtype, device: str, first: int = 0
) -> tuple[Tensor, ...]:
    """One layer of a pool (every second layer of a larger tensor, so strided), a block table, and angles."""
    keys = random(1, NUM_SLOTS, 2, 3, BLOCK_TOKENS, key_dim)[:, 1].to(device, dtype)
    values = random(2, NUM_SLOTS, 2, 3, BLOCK_TOKENS, value_dim)[:, 1].to(device, dtype)
    slots = torch.tensor([5, 0, 3, 1, 2][: len(sizes)], dtype=torch.int32, device=device)
    row_starts = torch.tensor([0, *sizes]).cumsum(0).add(first).int().to(device)
    angles = random(3, first + sum(sizes), key_dim).to(device)
    return keys, values, slots, row_starts, angles.cos().to(dtype), angles.sin().to(dtype)


def outputs(num_rows: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """A context with 4 spare rows behind it, all 7."""
    keys = torch.full((3, num_rows + 4, key_dim), 7.0, dtype=dtype, device=device)
    values = torch.full((3, num_rows + 4, value_dim), 7.0, dtype=dtype, device=device)
    return [keys, values]


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@on_each_device
@dtypes
@pytest.mark.parametrize(
    ("sizes", "key_dim", "value_dim"),
    [
        pytest.param([BLOCK_TOKENS], 64, 64, id="one full block"),
        pytest.param([1, 21, 0, 16, 17], 64, 64, id="ragged blocks"),
        pytest.param([20, 3], 10, 5, id="odd dims"),
        pytest.param([2], 2, 1, id="smallest dims"),
    ],
)
def test_rotate_gather_equals_its_reference_bit_for_bit(
    device: str, dtype: torch.dtype, sizes: list[int], key_dim: int, value_dim: int
) -> None:
    inputs = gather_inputs(sizes, key_dim, value_dim, dtype, device)
    if dtype is torch.bfloat16 and not HAS_GPU:
        # The interpreter truncates to bfloat16 where it should round: compare the same values in float32.
        dtype = torch.float32
        inputs = tuple(part.float() if part.is_floating_point() else part for part in inputs)
    wanted, found = (outputs(sum(sizes), key_dim, value_dim, dtype, device) for _ in range(2))
    reference.rotate_gather(*inputs, *(out[:, : sum(sizes)] for out in wanted))
    rotate_gather_triton.rotate_gather(*inputs, *(out[:, : sum(sizes)] for out in found))
    assert same_bits(found[0], wanted[0])
    assert same_bits(found[1], wanted[1])


@on_each_device
def test_rotate_gather_leaves_rows_alone_that_no_block_names(device: str) -> None:
    inputs = gather_inputs([4, 2], 8, 8, torch.float32, device, first=3)
    found = outputs(9, 8, 8, torch.float32, device)
    rotate_gather_triton.rotate_gather(*inputs, *found)
    assert bool((found[0][:, :3] == 7).all())
    assert bool((found[1][:, 9:] == 7).all())
    assert not bool((found[0][:, 3:9] == 7).any())


@on_each_device
@pytest.mark.parametrize("slot", [-1, NUM_SLOTS])
def test_rotate_gather_moves_nothing_for_a_slot_outside_the_pool(device: str, slot: int) -> None:
    keys, values, slots, row_starts, cos, sin = gather_inputs([5], 8, 8, torch.float32, device)
    found = outputs(5, 8, 8, torch.float32, device)
    rotate_gather_triton.rotate_gather(keys, values, slots.fill_(slot), row_starts, cos, sin, *found)
    assert bool((found[0] == 7).all())
    assert bool((found[1] == 7).all())


@on_each_device
def test_rotate_gather_of_no_blocks_writes_nothing(device: str) -> None:
    inputs = gather_inputs([], 8, 8, torch.float32, device)
    found = outputs(0, 8, 8, torch.float32, device)
    rotate_gather_triton.rotate_gather(*inputs, *found)
    assert bool((found[0] == 7).all())


def test_rotate_gather_reference_is_a_concatenation_that_is_then_rotated() -> None:
    keys, values, slots, row_starts, cos, sin = gather_inputs([1, 21, 16], 64, 32, torch.bfloat16, "cpu")
    found = outputs(38, 64, 32, torch.bfloat16, "cpu")
    reference.rotate_gather(keys, values, slots, row_starts, cos, sin, *found)
    pairs = list(zip(slots.tolist(), [1, 21, 16], strict=True))
    joined = torch.cat([keys[slot, :, :size] for slot, size in pairs], dim=1)
    half = torch.cat([-joined[..., 32:], joined[..., :32]], dim=-1)
    assert torch.equal(found[0][:, :38], joined * cos + half * sin)
    assert torch.equal(found[1][:, :38], torch.cat([values[slot, :, :size] for slot, size in pairs], dim=1))


@on_each_device
@dtypes
@pytest.mark.parametrize(
    ("num_queries", "dim", "sizes"),
    [
        pytest.param(1, 64, [1], id="one of each"),
        pytest.param(17, 96, [64, 65, 1, 0, 130], id="ragged blocks, one empty"),
        pytest.param(16, 7, [3, 2], id="odd dim"),
    ],
)
def test_best_similarity_equals_its_reference(
    device: str, dtype: torch.dtype, num_queries: int, dim: int, sizes: list[int]
) -> None:
    question = torch.nn.functional.normalize(random(4, num_queries, dim), dim=1).to(device, dtype)
    rows = torch.nn.functional.normalize(random(5, sum(sizes), dim), dim=1).to(device, dtype)
    row_starts = torch.tensor([0, *sizes]).cumsum(0).int().to(device)
    wanted = reference.best_similarity(question, rows, row_starts)
    if dtype is torch.bfloat16 and not HAS_GPU:
        question, rows = question.float(), rows.float()  # the interpreter's tl.dot is wrong on bfloat16
    found = maxsim_triton.best_similarity(question, rows, row_starts)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@on_each_device
@pytest.mark.parametrize(("num_queries", "num_blocks"), [(0, 3), (3, 0)])
def test_best_similarity_of_nothing_is_empty(device: str, num_queries: int, num_blocks: int) -> None:
    question, rows = torch.ones(num_queries, 8, device=device), torch.ones(num_blocks, 8, device=device)
    row_starts = torch.arange(num_blocks + 1, dtype=torch.int32, device=device)
    assert maxsim_triton.best_similarity(question, rows, row_starts).shape == (num_queries, num_blocks)
    assert reference.best_similarity(question, rows, row_starts).shape == (num_queries, num_blocks)


def test_best_similarity_reference_takes_the_largest_product_of_each_block() -> None:
    rows = torch.tensor([[9.0, 9.0], [1.0, 0.0], [2.0, -1.0], [0.0, 5.0]])
    best = reference.best_similarity(torch.eye(2), rows, torch.tensor([1, 3, 3, 4], dtype=torch.int32))
    assert best.tolist() == [[2.0, -float("inf"), 0.0], [0.0, -float("inf"), 5.0]]


def test_dispatch_runs_the_reference_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for twin, name in ((rotate_gather_triton, "rotate_gather"), (maxsim_triton, "best_similarity")):
        monkeypatch.delattr(twin, name)
    inputs = gather_inputs([5, 2], 8, 8, torch.float16, "cpu")
    wanted, found = (outputs(7, 8, 8, torch.float16, "cpu") for _ in range(2))
    reference.rotate_gather(*inputs, *wanted)
    dispatch.rotate_gather(*inputs, *found)
    assert torch.equal(found[0], wanted[0])
    rows, row_starts = random(6, 7, 8), inputs[3]
    assert torch.equal(
        dispatch.best_similarity(rows, rows, row_starts), reference.best_similarity(rows, rows, row_starts)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_dispatch_runs_the_twins_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(reference, "best_similarity")
    monkeypatch.delattr(reference, "rotate_gather")
    rows = random(6, 7, 8).cuda()
    inputs = gather_inputs([5, 2], 8, 8, torch.float16, "cuda")
    found = outputs(7, 8, 8, torch.float16, "cuda")
    dispatch.rotate_gather(*inputs, *found)
    assert not bool((found[0][:, :7] == 7).all())
    assert dispatch.best_similarity(rows, rows, inputs[3]).shape == (7, 2)
