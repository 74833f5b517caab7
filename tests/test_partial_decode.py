# SPDX-License-Identifier: Apache-2.0
"""One layer of 32 costs its own bytes: those of all others may be anything, and stay where they are.

But for `pca`, which codes layers together: test_codec_basis.py reads those.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore.codec import Codec, Profile, plane_span
from kvstore.layout import BlockLayout
from kvstore.spec import ModelSpec, chain_key
from kvstore.store import Access, FetchRequest, Outcome, Store, Tier
from tests.codec_slots import fitted

LAYERS = 32
TOKENS = 128
LAYOUT = BlockLayout(ModelSpec(LAYERS, 2, 64, 64, "bfloat16", "pre", "llama", "{}", "0"), TOKENS)
MOST = 1 / 20
ALONE = [profile for profile in Profile if profile is not Profile.PCA]
SINGLES = [range(layer, layer + 1) for layer in (0, 1, 17, LAYERS - 1)]


@pytest.fixture(scope="module")
def slot() -> Tensor:
    """A block of walks, which any coding shrinks."""
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    chance = torch.Generator().manual_seed(5)
    for rows in (LAYOUT.keys(slot), LAYOUT.values(slot)):
        rows.copy_(torch.randn(rows.shape, generator=chance).cumsum(2) / 8)
    return slot


@pytest.fixture(scope="module")
def codecs(slot: Tensor) -> dict[Profile, Codec]:
    calibration = fitted([(LAYOUT.keys(slot), LAYOUT.values(slot))])
    return {profile: Codec(LAYOUT, profile, calibration if profile.is_lossy else None) for profile in ALONE}


def encoded(codec: Codec, slot: Tensor) -> bytearray:
    out = bytearray(codec.bound(TOKENS))
    return out[: codec.encode(slot, TOKENS, 0, out)]


def cut(slot: Tensor, layers: range) -> Tensor:
    """Only those layers of a slot, zeros elsewhere."""
    part = torch.zeros_like(slot)
    for view in (LAYOUT.keys, LAYOUT.values):
        view(part)[layers.start : layers.stop] = view(slot)[layers.start : layers.stop]
    return part


@pytest.mark.parametrize("profile", ALONE)
@pytest.mark.parametrize("layers", SINGLES, ids=str)
def test_a_layer_decodes_among_garbage_and_takes_a_twentieth_at_most(
    slot: Tensor, codecs: dict[Profile, Codec], profile: Profile, layers: range
) -> None:
    codec = codecs[profile]
    record = encoded(codec, slot)
    whole, found = torch.zeros_like(slot), torch.zeros_like(slot)
    codec.decode(record, whole, num_tokens=TOKENS)
    info = codec.probe(record)
    offset, nbytes = plane_span(info, layers)
    record[info.header_nbytes : offset] = b"\xa5" * (offset - info.header_nbytes)
    record[offset + nbytes :] = b"\xa5" * (len(record) - offset - nbytes)

    codec.decode(record, found, num_tokens=TOKENS, layers=layers)

    assert torch.equal(found, cut(whole, layers))
    assert nbytes <= MOST * (len(record) - info.header_nbytes)


@pytest.mark.parametrize("profile", [Profile.RAW, Profile.LOSSLESS])
def test_a_store_reads_a_layer_from_an_extent_of_garbage_and_little_else(
    tmp_path: Path, slot: Tensor, codecs: dict[Profile, Codec], profile: Profile
) -> None:
    key = chain_key(None, b"", "layers")
    layers = SINGLES[2]
    with Store.open(
        tmp_path, access=Access.WRITE, layout=LAYOUT, profile=profile, host_nbytes=2 * LAYOUT.slot_nbytes
    ) as store:
        store.put([key], [slot], [TOKENS])
    record = encoded(codecs[profile], slot)
    offset, nbytes = plane_span(Codec.probe(record), layers)
    (path,) = (tmp_path / "extents").iterdir()
    stored = path.read_bytes()
    place = stored.index(record[offset : offset + nbytes])
    path.write_bytes(b"\xa5" * place + stored[place : place + nbytes] + b"\xa5" * (len(stored) - place - nbytes))

    found = torch.zeros_like(slot)
    with Store.open(tmp_path, access=Access.READ, layout=LAYOUT, host_nbytes=2 * LAYOUT.slot_nbytes) as store:
        report = store.fetch([FetchRequest(key, found, layers)])

    assert report.outcomes == [Outcome.DISK]
    assert torch.equal(found, cut(slot, layers))
    assert 0 < report.bytes_read[Tier.DISK] <= MOST * len(record)
