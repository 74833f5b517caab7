# SPDX-License-Identifier: Apache-2.0
"""Summaries of pages in a pool: those of the strategies that read tokens, in both forms, over any geometry."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.kernels import dispatch, summary_reference
from kvstore.kernels.paged_reference import Rotation, page_rows
from kvstore.kernels.summary_reference import KINDS
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.summarisers.bounds import CuboidMean, MinMax
from kvstore.retrieval.summarisers.mean import Mean
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.units import Units
from kvstore.retrieval.view import Summariser, View
from tests.layer_tokens import layer_tokens
from tests.paged_pools import BLOCK_TOKENS, NUM_SLOTS, Geometry, geometries, make_case

HAS_GPU = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled in this process, for the GPU")
kinds = pytest.mark.parametrize("kind", KINDS)
SUMMARISERS: dict[str, Summariser] = {"mean": Mean(), "min_max": MinMax(), "cuboid_mean": CuboidMean()}


def twin(keys: Tensor, rows: Tensor, *, rotation: Rotation | None, kind: str) -> Tensor:
    from kvstore.kernels import summary_triton

    return summary_triton.summarise_rows(keys, rows, rotation=rotation, kind=kind)


each_form = pytest.mark.parametrize(
    "summarise",
    [
        pytest.param(summary_reference.summarise_rows, id="reference"),
        pytest.param(twin, id="twin", marks=[needs_triton, interpreted]),
    ],
)
Summarise = Callable[..., Tensor]


def units_of(geometry: Geometry, unit_rows: int, device: str = "cpu") -> tuple[Tensor, Tensor, Rotation | None]:
    """A pool's keys, and its rows in units of any rows, some of them none."""
    case = make_case(geometry).to(geometry.dtype, device)
    num_units = geometry.num_rows // unit_rows
    shape = (geometry.num_lists, num_units, unit_rows)
    rotation = case.rotation
    if rotation is not None:
        angles = rotation.angles[:, : num_units * unit_rows].reshape(shape).contiguous()
        rotation = dataclasses.replace(rotation, angles=angles)
    return case.keys, case.rows[:, : num_units * unit_rows].reshape(shape).contiguous(), rotation


@each_form
@kinds
def test_pages_are_summarised_as_tokens_are(summarise: Summarise, kind: str) -> None:
    tokens = layer_tokens(BLOCK_TOKENS * 3, kv_heads=2, dim=16)
    assert tokens.rotate is not None
    slots = [4, 0, 7]
    keys = torch.full((NUM_SLOTS, 2, BLOCK_TOKENS, 16), math.nan)
    for slot, part in zip(slots, tokens.keys.split(BLOCK_TOKENS, dim=1), strict=True):
        keys[slot] = part
    first = torch.tensor([[BLOCK_TOKENS * slot for slot in slots]], dtype=torch.int32)
    rows = page_rows(first, torch.full_like(first, BLOCK_TOKENS), BLOCK_TOKENS)
    units = [Units.runs(0, [BLOCK_TOKENS] * 3)]
    plain, turned = (
        View(SUMMARISERS[kind], Dot(), space).summaries(tokens, units) for space in Space if space != "far"
    )
    torch.testing.assert_close(summarise(keys, rows, rotation=None, kind=kind), plain)
    # What the model's own rotary function makes of two unit vectors is the table.
    ones, zeros = torch.ones(1, 1, tokens.num_tokens, 8), torch.zeros(1, 1, tokens.num_tokens, 8)
    table = tokens.rotate(torch.cat([ones, zeros], dim=3), tokens.positions[:, None])[0, 0]
    angles = torch.arange(tokens.num_tokens, dtype=torch.int32).view_as(rows)
    rotation = Rotation(table[:, :8].contiguous(), table[:, 8:].contiguous(), angles)
    found = summarise(keys, rows, rotation=rotation, kind=kind)
    torch.testing.assert_close(found, turned, atol=1e-5, rtol=1e-5)


@needs_triton
@interpreted
@settings(max_examples=15, deadline=None)
@given(geometries(), st.sampled_from([1, 3, 16]), st.sampled_from(KINDS))
def test_the_twin_equals_the_reference_in_any_geometry(geometry: Geometry, unit_rows: int, kind: str) -> None:
    geometry = dataclasses.replace(geometry, num_rows=min(geometry.num_rows, 12 * unit_rows))
    keys, rows, rotation = units_of(geometry, unit_rows)
    wanted = summary_reference.summarise_rows(keys, rows, rotation=rotation, kind=kind)
    torch.testing.assert_close(twin(keys, rows, rotation=rotation, kind=kind), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_the_twin_equals_the_reference_on_a_gpu(dtype: torch.dtype, kind: str) -> None:
    for unit_rows in (1, 16, 100):
        keys, rows, rotation = units_of(Geometry(num_rows=1000, key_dim=96, half=40, dtype=dtype), unit_rows, "cuda")
        wanted = summary_reference.summarise_rows(keys, rows, rotation=rotation, kind=kind)
        torch.testing.assert_close(twin(keys, rows, rotation=rotation, kind=kind), wanted, atol=1e-4, rtol=1e-4)


@each_form
@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_halves_are_summed_in_float32(summarise: Summarise, kind: str, dtype: torch.dtype) -> None:
    keys, rows, rotation = units_of(Geometry(dtype=dtype), 16)
    assert rotation is not None
    exact = Rotation(rotation.cos.float(), rotation.sin.float(), rotation.angles)
    wanted = summary_reference.summarise_rows(keys.float(), rows, rotation=exact, kind=kind)
    found = summarise(keys, rows, rotation=rotation, kind=kind)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@needs_triton
@interpreted
@kinds
@pytest.mark.parametrize(("key_dim", "half"), [(33, 0), (33, 8), (2, 1), (1, 0)])
def test_keys_of_odd_width_are_summarised_whole(kind: str, key_dim: int, half: int) -> None:
    keys, rows, rotation = units_of(Geometry(key_dim=key_dim, half=half), 5)
    wanted = summary_reference.summarise_rows(keys, rows, rotation=rotation, kind=kind)
    torch.testing.assert_close(twin(keys, rows, rotation=rotation, kind=kind), wanted, atol=1e-5, rtol=1e-5)


@each_form
@kinds
def test_a_unit_of_no_rows_is_nought(summarise: Summarise, kind: str) -> None:
    keys, rows, rotation = units_of(Geometry(), 5)
    rows[:, 1] = -1
    rows[:, 2] = NUM_SLOTS * BLOCK_TOKENS
    found = summarise(keys, rows, rotation=rotation, kind=kind)
    assert found[:, 1:3].eq(0).all()
    assert found[:, 0].ne(0).any()
    assert summarise(keys, rows[:, :0], rotation=None, kind=kind).shape[1] == 0
    assert summarise(keys, rows[:, :, :0].contiguous(), rotation=None, kind=kind).eq(0).all()


def test_dispatch_summarises_on_the_cpu_by_the_reference() -> None:
    keys, rows, rotation = units_of(Geometry(), 5)
    wanted = summary_reference.summarise_rows(keys, rows, rotation=rotation, kind="min_max")
    assert torch.equal(dispatch.summarise_rows(keys, rows, rotation=rotation, kind="min_max"), wanted)


@each_form
def test_another_kind_is_refused(summarise: Summarise) -> None:
    keys, rows, _ = units_of(Geometry(), 5)
    with pytest.raises(ConfigError, match="median"):
        summarise(keys, rows, rotation=None, kind="median")
