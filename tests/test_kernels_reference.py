# SPDX-License-Identifier: Apache-2.0
"""The reference kernels against attention written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.kernels.reference import attend, attend_two_parts, received_mass

BATCH, HEADS, KV_HEADS, NEW, KEYS, DIM, VALUE_DIM = 2, 6, 2, 5, 12, 8, 4
SCALE = 0.3


def inputs(batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys, values."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, HEADS, NEW, DIM, generator=generator),
        torch.randn(batch, KV_HEADS, KEYS, DIM, generator=generator),
        torch.randn(batch, KV_HEADS, KEYS, VALUE_DIM, generator=generator),
    )


def causal() -> Tensor:
    """New tokens at the end."""
    return torch.ones(NEW, KEYS, dtype=torch.bool).tril(diagonal=KEYS - NEW)[None, None]


def weights(
    query: Tensor, keys: Tensor, mask: Tensor | None, query_far: Tensor | None = None, num_far: int = 0
) -> Tensor:
    """Attention weights, one number at a time."""
    out = torch.zeros(*query.shape[:3], keys.shape[2])
    for row in range(query.shape[0]):
        for head in range(HEADS):
            for number in range(NEW):
                logits = []
                for key in range(keys.shape[2]):
                    from_far = query_far is not None and key < num_far
                    vector = (query_far if from_far and query_far is not None else query)[row, head, number]
                    visible = mask is None or bool(mask[min(row, len(mask) - 1), 0, number, key])
                    product = float(vector @ keys[row, head // (HEADS // KV_HEADS), key]) * SCALE
                    logits.append(product if visible else float("-inf"))
                out[row, head, number] = torch.tensor(logits).softmax(dim=0)
    return out


def mixed(weight: Tensor, values: Tensor) -> Tensor:
    """Weighted values."""
    return weight @ values.repeat_interleave(HEADS // KV_HEADS, 1)


@pytest.mark.parametrize("mask", [None, causal()], ids=["all", "causal"])
def test_attend(mask: Tensor | None) -> None:
    query, keys, values = inputs()
    had = attend(query, keys, values, mask=mask, scale=SCALE)
    assert had.shape == (BATCH, HEADS, NEW, VALUE_DIM)
    assert torch.allclose(had, mixed(weights(query, keys, mask), values), atol=1e-5)


@pytest.mark.parametrize("num_far", [0, 1, 6, KEYS])
@pytest.mark.parametrize("mask", [None, causal()], ids=["all", "causal"])
def test_two_parts_share_one_softmax(mask: Tensor | None, num_far: int) -> None:
    query, keys, values = inputs()
    far = torch.randn(query.shape, generator=torch.Generator().manual_seed(4))
    had = attend_two_parts(far, query, keys, values, num_far=num_far, mask=mask, scale=SCALE)
    assert torch.allclose(had, mixed(weights(query, keys, mask, far, num_far), values), atol=1e-5)
    same = attend_two_parts(query, query, keys, values, num_far=num_far, mask=mask, scale=SCALE)
    assert torch.allclose(same, attend(query, keys, values, mask=mask, scale=SCALE), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_parts_keep_the_dtype_of_the_values(dtype: torch.dtype) -> None:
    query, keys, values = (part.to(dtype) for part in inputs())
    had = attend_two_parts(query, query, keys, values, num_far=3, mask=None, scale=SCALE)
    assert had.dtype == dtype
    exact = attend(query.float(), keys.float(), values.float(), mask=None, scale=SCALE)
    assert torch.allclose(had.float(), exact, atol=2e-2)


@pytest.mark.parametrize("num_received", [0, 1, 7, KEYS])
@pytest.mark.parametrize("mask", [None, causal()], ids=["all", "causal"])
def test_received_mass_is_the_sum_of_the_weights(mask: Tensor | None, num_received: int) -> None:
    query, keys, _ = inputs(batch=1)
    had = received_mass(query, keys, num_received=num_received, mask=mask, scale=SCALE)
    grouped = weights(query, keys, mask)[0].view(KV_HEADS, HEADS // KV_HEADS, NEW, KEYS).sum(dim=(1, 2))
    assert had.shape == (KV_HEADS, num_received)
    assert torch.allclose(had, grouped[:, KEYS - num_received :], atol=1e-5)
