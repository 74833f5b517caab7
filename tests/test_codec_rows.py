# SPDX-License-Identifier: Apache-2.0
"""Layers, heads and tokens decoded alone, to any strides: the same elements as of the whole, and no other byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.codec import Codec, Profile
from kvstore.errors import ShapeError
from kvstore.layout import BlockLayout
from kvstore.spec import ModelSpec
from tests.codec_slots import fitted

LAYERS, HEADS, KEY_DIM, VALUE_DIM, TOKENS = 3, 5, 72, 64, 300
LAYOUT = BlockLayout(ModelSpec(LAYERS, HEADS, KEY_DIM, VALUE_DIM, "bfloat16", "pre", "llama", "{}", "0"), TOKENS)


def make_slot() -> Tensor:
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(3)
    for view in (LAYOUT.keys(slot), LAYOUT.values(slot)):
        view.copy_(torch.randn(view.shape, generator=generator).cumsum(2) * 0.2)
    return slot


SLOT = make_slot()
CALIBRATION = fitted([(LAYOUT.keys(SLOT).float(), LAYOUT.values(SLOT).float())])
CASES = {
    str(name): Codec(LAYOUT, Profile(name), CALIBRATION if is_calibrated else None)
    for name, is_calibrated in [("raw", False), ("zstd", False), ("lossless", False), ("q8", False), ("q3", True)]
}


def record_of(name: str) -> bytes:
    codec = CASES[name]
    out = bytearray(codec.bound(TOKENS))
    return bytes(out[: codec.encode(SLOT, TOKENS, 0, out)])


RECORDS = {name: record_of(name) for name in CASES}


def whole(name: str) -> Tensor:
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    CASES[name].decode(RECORDS[name], slot, num_tokens=TOKENS)
    return slot


WHOLES = {name: whole(name) for name in CASES}


def ranges(total: int) -> st.SearchStrategy[range]:
    return st.tuples(st.integers(0, total - 1), st.integers(1, total)).map(
        lambda pair: range(pair[0], min(total, pair[0] + pair[1]))
    )


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15, deadline=None)
@given(layers=ranges(LAYERS), heads=ranges(HEADS), tokens=ranges(TOKENS), is_token_major=st.booleans())
def test_a_window_equals_that_part_of_the_whole(
    name: str, layers: range, heads: range, tokens: range, is_token_major: bool
) -> None:
    # K and V of a head side by side, as fused pools hold them, with a guard behind.
    shape = (len(layers), len(tokens), len(heads)) if is_token_major else (len(layers), len(heads), len(tokens))
    fused = torch.full((*shape, KEY_DIM + VALUE_DIM + 1), 7.0, dtype=torch.bfloat16)
    view = fused.transpose(1, 2) if is_token_major else fused
    info = Codec.probe(RECORDS[name])

    CASES[name].decode_rows(
        info,
        RECORDS[name],
        0,
        view[..., :KEY_DIM],
        view[..., KEY_DIM:-1],
        layers=layers,
        heads=heads,
        tokens=tokens,
    )

    part = (slice(layers.start, layers.stop), slice(heads.start, heads.stop), slice(tokens.start, tokens.stop))
    assert torch.equal(view[..., :KEY_DIM], LAYOUT.keys(WHOLES[name])[part])
    assert torch.equal(view[..., KEY_DIM:-1], LAYOUT.values(WHOLES[name])[part])
    assert bool((view[..., -1] == 7).all())


@pytest.mark.parametrize(
    ("heads", "tokens", "shape"),
    [
        (range(6), range(2), (3, 6, 2)),
        (range(1), range(299, 301), (3, 1, 2)),
        (range(1), range(2), (3, 1, 3)),
        (range(1), range(2), (2, 1, 2)),
        (range(0, 4, 2), range(2), (3, 2, 2)),
        (range(-1, 1), range(2), (3, 2, 2)),
    ],
)
def test_windows_that_do_not_fit_are_refused(heads: range, tokens: range, shape: tuple[int, ...]) -> None:
    keys = torch.zeros(*shape, KEY_DIM, dtype=torch.bfloat16)
    values = torch.zeros(*shape, VALUE_DIM, dtype=torch.bfloat16)

    with pytest.raises(ShapeError):
        CASES["raw"].decode_rows(
            Codec.probe(RECORDS["raw"]),
            RECORDS["raw"],
            0,
            keys,
            values,
            layers=range(3),
            heads=heads,
            tokens=tokens,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ShapeError):
        CASES["raw"].decode_rows(
            Codec.probe(RECORDS["raw"]),
            RECORDS["raw"],
            0,
            torch.zeros(3, 1, 1, KEY_DIM, dtype=dtype),
            torch.zeros(3, 1, 1, VALUE_DIM, dtype=dtype),
            layers=range(3),
            heads=range(1),
            tokens=range(1),
        )
