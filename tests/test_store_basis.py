# SPDX-License-Identifier: Apache-2.0
"""Stores of profile `pca`: how they come to bases, layers read alone, and what holds before there are any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore.calibration import MIN_TOKENS
from kvstore.cli.main import main
from kvstore.codec import Codec, Coding, Profile
from kvstore.decision import Decision
from kvstore.layout import BlockLayout
from kvstore.spec import BlockKey, ModelSpec, chain_key
from kvstore.store import Access, FetchRequest, Outcome, Store, StreamHeader
from kvstore.tiers.codec_shelf import CodecShelf
from tests.codec_slots import fitted

SPEC = ModelSpec(3, 1, 16, 16, "bfloat16", "pre", "test", "{}", "0")
TOKENS = 512
LAYOUT = BlockLayout(SPEC, TOKENS)
ENOUGH = MIN_TOKENS // TOKENS


def _slot(number: int) -> Tensor:
    """All layers follow from a few numbers a token."""
    fixed, chance = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number + 1)
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    hidden = torch.randn(TOKENS, 4, generator=chance)
    for view in (LAYOUT.keys(slot), LAYOUT.values(slot)):
        mixed = hidden @ torch.randn(4, 48, generator=fixed) + 0.1 * torch.randn(TOKENS, 48, generator=chance)
        view.copy_(mixed.view(TOKENS, 3, 1, 16).permute(1, 2, 0, 3))
    return slot


def _key(number: int) -> BlockKey:
    return chain_key(None, number.to_bytes(4, "little"), "blocks")


def _open(path: Path, access: Access) -> Store:
    return Store.open(path, access=access, layout=LAYOUT, profile=Profile.PCA, host_nbytes=4 * LAYOUT.slot_nbytes)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose last two blocks were written with bases; not to be changed."""
    path = tmp_path_factory.mktemp("store")
    with _open(path, Access.WRITE) as store:
        for number in range(ENOUGH + 3):
            assert store.put([_key(number)], [_slot(number)], [TOKENS]) == [Outcome.STORED]
            store.flush()
    return path


def _fetched(path: Path, number: int, layers: range | None = None) -> Tensor:
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    with _open(path, Access.READ) as store:
        report = store.fetch([FetchRequest(_key(number), slot, layers)])
    assert report.outcomes == [Outcome.DISK]
    return slot


def test_the_first_blocks_give_the_later_ones_their_bases(filled: Path) -> None:
    with _open(filled, Access.READ) as store:
        found = store._disk.look_up([_key(0), _key(ENOUGH + 2)], [True, True])
        decision = store.calibrations.of_model(SPEC)
        assert decision is not None
        calibration = store.calibrations.find(decision.calibration)
        assert store.verify().is_clean
    assert calibration is not None
    assert calibration.has_bases
    codings = []
    for each in found:
        assert each is not None
        assert not isinstance(each, Exception)
        assert each.directory is not None
        codings.append({plane.coding for plane in Codec.probe(each.directory).planes})
    assert codings == [{Coding.QUANTISED}, {Coding.BASIS}]


@pytest.mark.parametrize("number", [0, ENOUGH + 2])
@pytest.mark.parametrize("layers", [range(1), range(1, 2), range(2, 3), range(1, 3)], ids=str)
def test_layers_read_alone_are_those_of_the_whole(filled: Path, number: int, layers: range) -> None:
    whole, part = _fetched(filled, number), _fetched(filled, number, layers)
    for view in (LAYOUT.keys, LAYOUT.values):
        wanted = torch.zeros_like(view(whole))
        wanted[layers.start : layers.stop] = view(whole)[layers.start : layers.stop]
        assert torch.equal(view(part), wanted)
    error = (LAYOUT.keys(whole).float() - LAYOUT.keys(_slot(number)).float()).square().mean()
    assert 0 < error < 0.1 * LAYOUT.keys(_slot(number)).float().var()


def test_decisions_without_bases_hold_as_those_of_q2(tmp_path: Path) -> None:
    samples = [(LAYOUT.keys(_slot(0)), LAYOUT.values(_slot(0)))]
    decisions = {"q2": (-3, -2), "pca": (-9, -9)}
    with _open(tmp_path, Access.WRITE) as store:
        for with_bases, mults in ((False, (-3, -2)), (True, (-9, -9))):
            calibration = fitted(samples, with_bases=with_bases)
            store.calibrations.keep(SPEC, calibration, Decision(calibration.id, TOKENS, "a test", steps=decisions))
            codec = CodecShelf(store.calibrations, LAYOUT, Profile.PCA).encoder()
            out = bytearray(codec.bound(TOKENS))
            codec.encode(_slot(1), TOKENS, TOKENS, out)
            planes = Codec.probe(out).planes
            assert tuple(plane.mult for plane in planes[:2]) == mults


@pytest.mark.parametrize("large", [1e12, 1e20, 3e38])
@pytest.mark.parametrize("view", [LAYOUT.keys, LAYOUT.values], ids=["keys", "values"])
def test_one_large_value_stops_no_writer(tmp_path: Path, view: Callable[[Tensor], Tensor], large: float) -> None:
    with _open(tmp_path, Access.WRITE) as store:
        for number in range(ENOUGH + 2):
            slot = _slot(number)
            if number == 2:
                view(slot)[0, 0, 7, 3] = large
            assert store.put([_key(number)], [slot], [TOKENS]) == [Outcome.STORED]
            store.flush()
        decision = store.calibrations.of_model(SPEC)
        assert decision is not None
        assert store.verify().is_clean
    assert _fetched(tmp_path, 2).any()


def test_a_calibration_that_fails_is_told_once_and_blocks_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(matrix: Tensor) -> None:
        raise RuntimeError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with _open(tmp_path, Access.WRITE) as store:
        for number in range(ENOUGH + 2):
            assert store.put([_key(number)], [_slot(number)], [TOKENS]) == [Outcome.STORED]
            store.flush()
    assert ["did not converge" in message for message in caplog.messages] == [True]
    assert _fetched(tmp_path, ENOUGH + 1).any()


def test_inspecting_tells_what_was_decided_for_what_blocks_are_coded_as(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged, exact = {"q2": 0.2, "pca": 0.1}, {"q2": 0.01}
    samples = [(LAYOUT.keys(_slot(0)), LAYOUT.values(_slot(0)))]
    found = []
    for with_bases in (False, True):
        with _open(tmp_path, Access.WRITE) as store:
            if not with_bases:
                store.create_stream(StreamHeader("s", SPEC, TOKENS, Profile.PCA, "window=64", {}, 1.0))
            calibration = fitted(samples, with_bases=with_bases)
            decision = Decision(calibration.id, TOKENS, "a test", judged, {}, exact)
            store.calibrations.keep(SPEC, calibration, decision)
        assert main(["inspect", "--store", str(tmp_path), "--stream", "s", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)["calibration"]
        found.append((shown["coded_as"], shown["divergence"], shown["exact_keys"]))
    assert found == [("q2", 0.2, True), ("pca", 0.1, False)]
