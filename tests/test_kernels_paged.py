# SPDX-License-Identifier: Apache-2.0
"""Attention to rows of a pool: written out by hand, its Triton twin, and nothing where nothing is seen."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kvstore.kernels import dispatch, paged_reference
from kvstore.kernels.paged_reference import Rotation, attend_rows, page_rows
from kvstore.kernels.parts_reference import Part, merge_parts
from tests.paged_pools import BLOCK_TOKENS, NUM_SLOTS, Case, Geometry, geometries, make_case

HAS_GPU = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled in this process, for the GPU")
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def arguments(case: Case) -> dict[str, Any]:
    return {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}


def reference(case: Case) -> Part:
    return attend_rows(**arguments(case))


def twin(case: Case) -> Part:
    from kvstore.kernels import attend_rows_triton

    return attend_rows_triton.attend_rows(**arguments(case))


each_form = pytest.mark.parametrize(
    "attend",
    [pytest.param(reference, id="reference"), pytest.param(twin, id="twin", marks=[needs_triton, interpreted])],
)


def by_hand(case: Case) -> Part:
    """One number at a time."""
    batch, num_heads, num_queries, _ = case.query.shape
    out = torch.zeros(batch, num_heads, num_queries, case.values.shape[3])
    sums = torch.full((batch, num_heads, num_queries), -math.inf)
    group = num_heads // case.keys.shape[1]
    for sequence, head, token in torch.cartesian_prod(
        torch.arange(batch), torch.arange(num_heads), torch.arange(num_queries)
    ).tolist():
        own = head // group
        table = own % case.rows.shape[0]
        weights: list[float] = []
        values: list[Tensor] = []
        for number, row in enumerate(case.rows[table].tolist()):
            bias = 0.0 if case.bias is None else float(case.bias[table, number])
            if row < 0 or bias == -math.inf:
                continue
            key = case.keys[row // BLOCK_TOKENS, own, row % BLOCK_TOKENS].clone()
            if case.rotation is not None:
                angle = int(case.rotation.angles[table, number])
                cos, sin = case.rotation.cos[angle], case.rotation.sin[angle]
                half = cos.shape[0]
                low, high = key[:half].clone(), key[half : 2 * half].clone()
                key[:half], key[half : 2 * half] = low * cos - high * sin, high * cos + low * sin
            weights.append(float(case.query[sequence, head, token] @ key) * case.scale + bias)
            values.append(case.values[row // BLOCK_TOKENS, own, row % BLOCK_TOKENS])
        if weights:
            logits = torch.tensor(weights)
            sums[sequence, head, token] = logits.logsumexp(0)
            out[sequence, head, token] = logits.softmax(0) @ torch.stack(values)
    return out, sums


def close(found: Part, wanted: Part, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param(Geometry(num_rows=12, num_queries=2, has_bias=True), id="a list for each head, a bias"),
        pytest.param(Geometry(num_rows=9, num_lists=1, half=8, batch=2), id="one list, partly rotated, two sequences"),
        pytest.param(Geometry(num_rows=5, half=0, group=1, kv_heads=3, num_lists=3), id="keys as they lie"),
    ],
)
def test_the_reference_is_attention_written_out(geometry: Geometry) -> None:
    case = make_case(geometry)
    close(reference(case), by_hand(case), 1e-5)


@needs_triton
@interpreted
@settings(max_examples=20, deadline=None)
@given(geometries())
def test_the_twin_equals_the_reference_in_any_geometry(geometry: Geometry) -> None:
    case = make_case(geometry)
    close(twin(case), reference(case), 2e-5)


@needs_triton
@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_twin_takes_halves(dtype: torch.dtype) -> None:
    case = make_case(Geometry(group=3, num_rows=130, dtype=dtype, has_bias=True))
    # The interpreter's tl.dot is wrong on bfloat16, and its casts to it truncate: compare the same values in float32.
    close(twin(case.to(torch.float32) if dtype is torch.bfloat16 else case), reference(case), TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("key_dim", [64, 96, 256])
def test_the_twin_equals_the_reference_on_a_gpu(dtype: torch.dtype, key_dim: int) -> None:
    for num_rows in (0, 1, 65, 5000):
        geometry = Geometry(group=7, key_dim=key_dim, half=key_dim // 2, num_rows=num_rows, num_queries=3, dtype=dtype)
        case = make_case(dataclasses.replace(geometry, has_bias=True)).to(dtype, "cuda")
        close(twin(case), reference(case), TOLERANCES[dtype])


@each_form
def test_what_may_not_be_seen_may_hold_anything(attend: Callable[[Case], Part]) -> None:
    case = make_case(Geometry(num_rows=70, has_bias=True))
    assert case.bias is not None
    assert case.rotation is not None
    hidden = case.bias.isneginf()
    spoilt = NUM_SLOTS * BLOCK_TOKENS - 1
    rows = case.rows.masked_fill(case.rows == spoilt, 0).masked_fill(hidden, spoilt)
    wanted = attend(dataclasses.replace(case, rows=rows))
    for plane in (case.keys, case.values):
        plane[spoilt // BLOCK_TOKENS, :, spoilt % BLOCK_TOKENS] = math.nan
    close(attend(dataclasses.replace(case, rows=rows)), wanted, 0)
    beyond = rows.masked_fill(hidden, NUM_SLOTS * BLOCK_TOKENS)
    seen = case.bias.masked_fill(hidden, 0)
    close(attend(dataclasses.replace(case, rows=beyond, bias=seen)), wanted, 0)
    angles = case.rotation.angles.masked_fill(hidden, case.rotation.cos.shape[0])
    turned = Rotation(case.rotation.cos, case.rotation.sin, angles)
    close(attend(dataclasses.replace(case, rows=rows, rotation=turned, bias=seen)), wanted, 0)


@each_form
@pytest.mark.parametrize("num_rows", [0, 3, 130])
def test_a_query_that_sees_nothing_weighs_nothing(attend: Callable[[Case], Part], num_rows: int) -> None:
    case = make_case(Geometry(num_rows=num_rows))
    out, sums = attend(dataclasses.replace(case, rows=torch.full_like(case.rows, -1)))
    assert out.eq(0).all()
    assert sums.isneginf().all()


@each_form
def test_parts_of_the_rows_merge_to_the_whole(attend: Callable[[Case], Part]) -> None:
    case = make_case(Geometry(num_rows=90, num_queries=2, has_bias=True))
    parts = [attend(case.of_rows(slice(*ends))) for ends in ((0, 0), (0, 1), (1, 70), (70, 90))]
    close(merge_parts(parts), reference(case), 2e-5)


@needs_triton
@interpreted
@pytest.mark.parametrize("num_splits", [1, 16, 17, 40])
def test_any_number_of_splits_merges(num_splits: int) -> None:
    from kvstore.kernels.merge_splits_triton import merge_splits

    chance = torch.Generator().manual_seed(num_splits)
    outs, sums = (
        torch.randn(num_splits, 2, 3, 2, 5, generator=chance),
        torch.randn(num_splits, 2, 3, 2, generator=chance),
    )
    sums = (40 * sums).masked_fill(torch.rand(sums.shape, generator=chance) < 0.3, -math.inf)
    sums[:, 0, 1] = -math.inf
    outs = outs.masked_fill(sums.isneginf()[..., None], 0)
    close(merge_splits(outs, sums), merge_parts(list(zip(outs, sums, strict=True))), 1e-5)


def test_dispatch_attends_on_the_cpu_by_the_reference() -> None:
    case = make_case(Geometry(num_rows=9))
    for found, wanted in zip(dispatch.attend_rows(**arguments(case)), reference(case), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_dispatch_attends_on_a_gpu_by_the_twin_but_to_wide_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = make_case(Geometry(key_dim=300, num_rows=9)).to(torch.float32, "cuda")
    close(dispatch.attend_rows(**arguments(wide)), reference(wide), 1e-5)
    case = make_case(Geometry(num_rows=9)).to(torch.float32, "cuda")
    wanted = reference(case)
    monkeypatch.delattr(paged_reference, "attend_rows")
    close(dispatch.attend_rows(**arguments(case)), wanted, 1e-5)


def test_pages_are_runs_inside_a_slot() -> None:
    first = torch.tensor([[14, 0, -1]], dtype=torch.int32)
    counts = torch.tensor([[3, 1, 2]], dtype=torch.int32)
    rows = page_rows(first, counts, 3)
    assert rows.dtype is torch.int32
    assert rows.tolist() == [[[14, 15, 16], [0, -1, -1], [-1, -1, -1]]]
