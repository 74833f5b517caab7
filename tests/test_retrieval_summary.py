# SPDX-License-Identifier: Apache-2.0
"""Summaries: what they hold, and what hostile bytes do to them."""

from __future__ import annotations

import pytest
import torch

from kvstore.errors import CorruptRecordError
from kvstore.retrieval.summary import Summary, SummaryKind, received_of, summarise


def small() -> Summary:
    """A summary with a section of every kind."""
    return Summary(
        {
            SummaryKind.RECEIVED: torch.arange(96, dtype=torch.uint8).view(6, 16),
            SummaryKind.POSITION: torch.arange(6, dtype=torch.int32).view(3, 2),
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


def test_received_attention_is_kept_within_a_fortieth() -> None:
    received = torch.logspace(-3.3, 1.1, 3 * 2 * 50).view(3, 2, 50)
    again = received_of(summarise(torch.arange(50)[None], received, 0), received.shape)
    assert ((again - received).abs() <= received / 40).all()


def test_no_attention_and_too_much_stay_what_they_are() -> None:
    received = torch.tensor([0.0, 1e-30, 1e30]).view(1, 1, 3)
    again = received_of(summarise(torch.arange(3)[None], received, 0), received.shape)
    assert again[0, 0, :2].tolist() == [0.0, 0.0]
    assert again[0, 0, 2] > 16


OTHER_SHAPE = summarise(torch.arange(4)[None], torch.ones(3, 2, 4), 0)


@pytest.mark.parametrize("data", [b"", b"nothing of the kind", OTHER_SHAPE])
def test_unusable_received_attention_is_none(data: bytes) -> None:
    assert received_of(data, (3, 2, 5)).tolist() == torch.zeros(3, 2, 5).tolist()


def test_positions_are_stored_where_they_cannot_be_told() -> None:
    received = torch.ones(1, 1, 4)
    assert SummaryKind.POSITION not in Summary.from_bytes(summarise(torch.arange(7, 11)[None], received, 7)).parts
    later = torch.arange(9, 13)[None]
    assert torch.equal(Summary.from_bytes(summarise(later, received, 7)).parts[SummaryKind.POSITION].long(), later)
    grid = torch.arange(12).view(3, 4)
    assert torch.equal(Summary.from_bytes(summarise(grid, received, 0)).parts[SummaryKind.POSITION].long(), grid)
