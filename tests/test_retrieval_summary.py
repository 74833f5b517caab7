# SPDX-License-Identifier: Apache-2.0
"""Summaries: what they hold, and what hostile bytes do to them."""

from __future__ import annotations

import pytest
import torch

from kvstore.errors import CorruptRecordError
from kvstore.retrieval.summary import (
    Summary,
    SummaryKind,
    mean_keys,
    received_keys,
)

KEYS = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0))


def small() -> Summary:
    """A summary with a section of every kind."""
    return Summary(
        {
            SummaryKind.MEAN_KEY: mean_keys(KEYS)[:, :2].contiguous(),
            SummaryKind.POSITION: torch.arange(6, dtype=torch.int32).view(3, 2),
            SummaryKind.RECEIVED_KEY: torch.empty(0, 4, dtype=torch.float16),
        }
    )


def test_round_trip() -> None:
    summary = small()
    again = Summary.from_bytes(summary.to_bytes())
    assert list(again.parts) == list(summary.parts)
    for kind, part in summary.parts.items():
        assert again.parts[kind].dtype == part.dtype
        assert torch.equal(again.parts[kind], part)
    assert Summary.from_bytes(Summary({}).to_bytes()).parts == {}


def test_every_truncation_is_refused() -> None:
    data = small().to_bytes()
    for length in range(len(data)):
        with pytest.raises(CorruptRecordError):
            Summary.from_bytes(data[:length])


def test_every_flipped_bit_is_refused_or_harmless() -> None:
    summary = small()
    data = summary.to_bytes()
    refused = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            parts = Summary.from_bytes(bytes(damaged)).parts
        except CorruptRecordError:
            refused += 1
            continue
        for part in parts.values():
            assert part.dim() == 2
            assert part.numel() * part.element_size() <= len(data)
    assert refused > 200


def test_unknown_sections_are_skipped() -> None:
    summary = small()
    data = bytearray(summary.to_bytes())
    data[8] = 200  # the first section's kind
    assert list(Summary.from_bytes(bytes(data)).parts) == list(summary.parts)[1:]


def test_mean_is_the_mean() -> None:
    assert torch.allclose(mean_keys(KEYS).float(), KEYS.mean(dim=2).flatten(1), atol=1e-3)


def test_received_keys_take_the_most_looked_at() -> None:
    received = torch.zeros(3, 2, 5)
    received[0, 0, 1] = received[0, 1, 4] = 1.0
    had = received_keys(KEYS, received, top=1)[0].float()
    assert torch.allclose(had, torch.cat([KEYS[0, 0, 1], KEYS[0, 1, 4]]), atol=1e-3)
    everything = received_keys(KEYS, received, top=99)
    assert torch.equal(everything, mean_keys(KEYS))


@pytest.mark.parametrize("factor", [0.0, 1e-9, 1e5, 1e9])
def test_extreme_keys_stay_finite(factor: float) -> None:
    keys = KEYS * factor
    for part in (mean_keys(keys), received_keys(keys, torch.rand(3, 2, 5))):
        assert part.isfinite().all()
