# SPDX-License-Identifier: Apache-2.0
"""Attention over parts: merged, it is attention over all; estimated, it is exact where keys are equal."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.kernels.parts_reference import attend_part, estimated_part, merge_parts
from kvstore.kernels.reference import attend


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(
    kv_heads=st.integers(1, 4),
    group=st.sampled_from([1, 2, 3, 16]),
    key_dim=st.sampled_from([32, 48, 64, 256]),
    value_dim=st.sampled_from([16, 64]),
    num_queries=st.integers(1, 4),
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
    seed=st.integers(0, 99),
)
def test_merged_parts_are_attention_over_all(
    kv_heads: int, group: int, key_dim: int, value_dim: int, num_queries: int, sizes: list[int], seed: int
) -> None:
    query = random(2, kv_heads * group, num_queries, key_dim, seed=seed)
    keys = random(2, kv_heads, sum(sizes), key_dim, seed=seed + 1)
    values = random(2, kv_heads, sum(sizes), value_dim, seed=seed + 2)
    mask = random(2, 1, num_queries, sum(sizes), seed=seed + 3) > 0
    mask[..., -1] = True
    scale = key_dim**-0.5
    parts = [
        attend_part(query, part_keys, part_values, mask=part_mask, scale=scale)
        for part_keys, part_values, part_mask in zip(
            keys.split(sizes, 2), values.split(sizes, 2), mask.split(sizes, 3), strict=True
        )
    ]
    out, sums = merge_parts(parts)
    torch.testing.assert_close(out, attend(query, keys, values, mask=mask, scale=scale), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sums, attend_part(query, keys, values, mask=mask, scale=scale)[1])


def test_a_mask_may_differ_between_kv_heads() -> None:
    query, keys, values = random(1, 4, 1, 8, seed=0), random(1, 2, 6, 8, seed=1), random(1, 2, 6, 8, seed=2)
    mask = torch.tensor([[True, True, False, False, False, False], [False, False, True, True, True, True]])
    out, _ = attend_part(query, keys, values, mask=mask[None, :, None], scale=1.0)
    for head, seen in enumerate((slice(0, 2), slice(2, 6))):
        heads = slice(2 * head, 2 * head + 2)
        one = slice(head, head + 1)
        alone = attend(query[:, heads], keys[:, one, seen], values[:, one, seen], mask=None, scale=1.0)
        torch.testing.assert_close(out[:, heads], alone)


def test_what_sees_nothing_weighs_nothing() -> None:
    query, keys, values = random(1, 2, 3, 8, seed=0), random(1, 1, 5, 8, seed=1), random(1, 1, 5, 8, seed=2)
    blind = attend_part(query, keys, values, mask=torch.zeros(1, 1, 3, 5, dtype=torch.bool), scale=1.0)
    empty = attend_part(query, keys[:, :, :0], values[:, :, :0], mask=None, scale=1.0)
    seeing = attend_part(query, keys, values, mask=None, scale=1.0)
    for nothing in (blind, empty, merge_parts([blind, empty])):
        assert nothing[0].eq(0).all()
        assert nothing[1].isneginf().all()
    torch.testing.assert_close(merge_parts([blind, seeing, empty]), seeing)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    group=st.sampled_from([1, 4, 16]),
    key_dim=st.sampled_from([32, 128]),
    seed=st.integers(0, 99),
)
def test_an_estimate_is_exact_where_all_keys_of_a_unit_are_equal(
    sizes: list[int], group: int, key_dim: int, seed: int
) -> None:
    query, kinds = random(1, 2 * group, 2, key_dim, seed=seed), random(1, 2, len(sizes), key_dim, seed=seed + 1)
    values = random(1, 2, sum(sizes), 16, seed=seed + 2)
    counts = torch.tensor(sizes)
    sums = torch.stack([part.sum(2) for part in values.split(sizes, 2)], dim=2)
    # A unit without tokens is no unit.
    kinds, sums = (torch.cat([each, torch.zeros_like(each[:, :, :1])], dim=2) for each in (kinds, sums))
    padded = torch.tensor([*sizes, 0]).float().expand(1, 2, -1)
    found = estimated_part(query, kinds, padded, sums, scale=key_dim**-0.5)
    keys = kinds[:, :, :-1].repeat_interleave(counts, dim=2)
    torch.testing.assert_close(found, attend_part(query, keys, values, mask=None, scale=key_dim**-0.5))


def test_an_estimate_weighs_a_unit_by_its_mean_key_and_its_tokens() -> None:
    query, centroids = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 5.0], [-1.0, 2.0]])
    counts, value_sums = torch.tensor([3.0, 2.0]), torch.tensor([[6.0], [10.0]])
    out, sums = estimated_part(
        query[None, None, None], centroids[None, None], counts[None, None], value_sums[None, None], scale=1.0
    )
    weight = 3 * math.exp(1) + 2 * math.exp(-1)
    assert math.isclose(float(out), (6 * math.exp(1) + 10 * math.exp(-1)) / weight, rel_tol=1e-5)
    assert math.isclose(float(sums), math.log(weight), rel_tol=1e-5)
