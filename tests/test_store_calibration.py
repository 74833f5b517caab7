# SPDX-License-Identifier: Apache-2.0
"""Lossy stores: how a model comes to a calibration, who uses it, and blocks whose calibration is gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore.calibration import MIN_TOKENS, Calibration
from kvstore.codec import Codec, Coding, Profile, RecordInfo
from kvstore.decision import Decision
from kvstore.errors import CorruptRecordError, ReadOnlyError, SpecMismatchError
from kvstore.layout import BlockLayout
from kvstore.spec import BlockKey, ModelSpec, chain_key
from kvstore.store import Access, Durability, Entry, FetchRequest, NewBlock, Outcome, Store, StreamHeader
from kvstore.tiers.catalogue import Table
from kvstore.tiers.disk import DiskTier
from tests.codec_slots import fitted

SPEC = ModelSpec(2, 1, 64, 64, "bfloat16", "pre", "test", "{}", "0")
TOKENS = 1024
LAYOUT = BlockLayout(SPEC, TOKENS)
ENOUGH = MIN_TOKENS // TOKENS + 1
"""Blocks after which a calibration is there: the first tokens of the stream do not count."""


def _open(path: Path, access: Access = Access.WRITE, profile: Profile = Profile.Q4) -> Store:
    return Store.open(
        path,
        access=access,
        layout=LAYOUT,
        profile=profile,
        host_nbytes=4 * LAYOUT.slot_nbytes,
        durability=Durability.NONE,
    )


def _header(name: str = "s", profile: Profile = Profile.Q4) -> StreamHeader:
    return StreamHeader(name, SPEC, TOKENS, profile, "window=64", {}, 1.0)


def _slot(number: int) -> Tensor:
    """Keys with a mean and a sigma per channel, values without."""
    chance = torch.Generator().manual_seed(number)
    slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
    shape = (SPEC.num_layers, SPEC.kv_heads, TOKENS, 64)
    channels = torch.arange(64) / 16
    LAYOUT.keys(slot).copy_(torch.randn(shape, generator=chance) * 2.0 ** (channels - 2) + channels)
    LAYOUT.values(slot).copy_(torch.randn(shape, generator=chance))
    return slot


def _key(number: int, stream: str = "s") -> BlockKey:
    return chain_key(None, number.to_bytes(4, "little"), stream)


def _append(store: Store, numbers: range, name: str = "s") -> None:
    store.append(
        name,
        [NewBlock(Entry(n, _key(n, name), TOKENS, n * TOKENS, 0.0, 1.0, -1), _slot(n), b"") for n in numbers],
        {},
    )
    store.flush()


def _written(path: Path, numbers: range, profile: Profile = Profile.Q4) -> None:
    with _open(path, profile=profile) as store:
        store.create_stream(_header(profile=profile))
        for number in numbers:
            _append(store, range(number, number + 1))


def _infos(path: Path, count: int, name: str = "s") -> list[RecordInfo]:
    with Store.open(path, access=Access.READ) as store:
        found = store._disk.look_up([_key(n, name) for n in range(count)], [True] * count)
    infos = []
    for each in found:
        assert each is not None
        assert not isinstance(each, Exception)
        assert each.directory is not None
        infos.append(Codec.probe(each.directory))
    return infos


def _fetch(path: Path, count: int, profile: Profile = Profile.Q4) -> tuple[list[Outcome], dict[int, str], list[Tensor]]:
    slots = [torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8) for _ in range(count)]
    with _open(path, Access.READ, profile) as store:
        report = store.fetch([FetchRequest(_key(n), slot) for n, slot in enumerate(slots)])
    return report.outcomes, report.reasons, slots


def _change_table(path: Path, key_start: bytes, value: bytes | None) -> None:
    """Replace or remove rows of the calibration table whose keys begin so."""
    from kvstore.config import StoreConfig

    disk = DiskTier(path, StoreConfig(Access.WRITE, Durability.NONE, host_nbytes=0))
    with disk.catalogue.read() as view:
        keys = [key for key, _ in view.scan(Table.CALIBRATIONS, prefix=key_start)]
    for key in keys:
        if value is None:
            disk.catalogue.write(lambda view, key=key: view.delete(Table.CALIBRATIONS, key))  # type: ignore[misc]
        else:
            disk.catalogue.write(lambda view, key=key: view.put(Table.CALIBRATIONS, key, value))  # type: ignore[misc]
    disk.close()


def test_the_first_blocks_of_a_lossy_stream_calibrate_the_later_ones(tmp_path: Path) -> None:
    _written(tmp_path, range(ENOUGH + 2))
    infos = _infos(tmp_path, ENOUGH + 2)
    assert [any(info.calibration_id) for info in infos] == [False] * ENOUGH + [True] * 2
    with Store.open(tmp_path, access=Access.READ) as store:
        decision = store.calibrations.of_model(SPEC)
        assert decision is not None
        assert decision.calibration == infos[-1].calibration_id
        assert decision.num_tokens == ENOUGH * TOKENS - 4
        assert store.calibrations.all() == [(SPEC.fingerprint, decision)]
        assert store.verify().is_clean
    outcomes, _, slots = _fetch(tmp_path, ENOUGH + 2)
    assert set(outcomes) == {Outcome.DISK}
    for number, slot in enumerate(slots):
        keys, exact = LAYOUT.keys(slot).float(), LAYOUT.keys(_slot(number)).float()
        assert 0 < (keys - exact).square().mean() < 0.1 * exact.var()


def test_plain_blocks_calibrate_their_model_too(tmp_path: Path) -> None:
    count = ENOUGH + 1
    with _open(tmp_path) as store:
        for number in range(count):
            assert store.put([_key(number)], [_slot(number)], [TOKENS]) == [Outcome.STORED]
    infos = _infos(tmp_path, count)
    assert [any(info.calibration_id) for info in infos] == [False] * ENOUGH + [True]
    assert infos[0].planes[0].mult > infos[-1].planes[0].mult  # what knows less must be finer


def test_a_later_writer_uses_the_calibration_from_its_first_block_on(tmp_path: Path) -> None:
    _written(tmp_path, range(ENOUGH))
    with _open(tmp_path) as store:
        store.create_stream(_header("other"))
        _append(store, range(1), "other")
    (info,) = _infos(tmp_path, 1, "other")
    assert any(info.calibration_id)


@pytest.mark.parametrize("profile", [Profile.RAW, Profile.ZSTD, Profile.LOSSLESS])
def test_exact_stores_are_never_calibrated(tmp_path: Path, profile: Profile) -> None:
    _written(tmp_path, range(ENOUGH + 1), profile)
    with Store.open(tmp_path, access=Access.READ) as store:
        assert store.calibrations.all() == []
    assert not any(any(info.calibration_id) for info in _infos(tmp_path, ENOUGH + 1))


def test_the_same_blocks_make_the_same_calibration(tmp_path: Path) -> None:
    ids = set()
    for folder in (tmp_path / "one", tmp_path / "two"):
        _written(folder, range(ENOUGH))
        with Store.open(folder, access=Access.READ) as store:
            ids.add(store.calibrations.all()[0][1].calibration)
    assert len(ids) == 1


@pytest.mark.parametrize(("value", "reason"), [(None, "does not hold"), (b"KVCL", "cut off"), (b"", "cut off")])
def test_blocks_whose_calibration_is_gone_or_damaged_are_damaged_and_the_others_are_read(
    tmp_path: Path, value: bytes | None, reason: str
) -> None:
    _written(tmp_path, range(ENOUGH + 1))
    _change_table(tmp_path, b"o", value)
    outcomes, reasons, _ = _fetch(tmp_path, ENOUGH + 1)
    assert outcomes == [Outcome.DISK] * ENOUGH + [Outcome.DAMAGED]
    assert reason in reasons[ENOUGH]
    with Store.open(tmp_path, access=Access.READ) as store:
        (fault,) = store.verify().faults
    assert (fault.index, fault.key) == (ENOUGH, _key(ENOUGH))
    assert reason in fault.reason


def test_another_calibration_under_the_name_of_the_right_one_is_noticed(tmp_path: Path) -> None:
    _written(tmp_path, range(ENOUGH + 1))
    other = fitted([(torch.randn(2, 1, 8, 64), torch.randn(2, 1, 8, 64))])
    _change_table(tmp_path, b"o", other.data)
    outcomes, reasons, _ = _fetch(tmp_path, ENOUGH + 1)
    assert outcomes[ENOUGH] is Outcome.DAMAGED
    assert "another under that name" in reasons[ENOUGH]


def test_a_damaged_decision_stops_the_writer_and_no_reader(tmp_path: Path) -> None:
    _written(tmp_path, range(ENOUGH + 1))
    _change_table(tmp_path, b"m", b"{}")
    assert set(_fetch(tmp_path, ENOUGH + 1)[0]) == {Outcome.DISK}
    with pytest.raises(CorruptRecordError, match="decision"), _open(tmp_path) as store:
        _append(store, range(ENOUGH + 1, ENOUGH + 2))


def _fitted() -> Calibration:
    return fitted([(LAYOUT.keys(_slot(99)), LAYOUT.values(_slot(99)))])


def test_a_given_calibration_is_used_at_once_and_not_replaced(tmp_path: Path) -> None:
    calibration = _fitted()
    with _open(tmp_path) as store:
        store.create_stream(_header())
        _append(store, range(1))
        store.calibrations.keep(SPEC, calibration, Decision(calibration.id, 1024, "a test"))
        for number in range(1, ENOUGH + 1):
            _append(store, range(number, number + 1))
    ids = [info.calibration_id for info in _infos(tmp_path, ENOUGH + 1)]
    assert ids == [bytes(16)] + [calibration.id] * ENOUGH


def test_a_decision_that_may_not_replace_another_one_is_dropped(tmp_path: Path) -> None:
    calibration, other = _fitted(), fitted([(torch.randn(2, 1, 8, 64), torch.randn(2, 1, 8, 64))])
    first, second = Decision(calibration.id, 1, "first"), Decision(other.id, 1, "second")
    with _open(tmp_path) as store:
        store.calibrations.keep(SPEC, calibration, first, replace=False)
        store.calibrations.keep(SPEC, other, second, replace=False)
        assert store.calibrations.of_model(SPEC) == first
        store.calibrations.keep(SPEC, other, second)
    with _open(tmp_path, Access.READ) as store:
        assert store.calibrations.of_model(SPEC) == second


def test_profiles_beyond_their_limit_keep_keys_exactly(tmp_path: Path) -> None:
    calibration = _fitted()
    decision = Decision(calibration.id, 1024, "a test", {"q4": 0.5, "q8": 0.0}, {}, {"q4": 0.1})
    for profile, is_exact in ((Profile.Q4, True), (Profile.Q8, False)):
        folder = tmp_path / profile
        with _open(folder, profile=profile) as store:
            store.calibrations.keep(SPEC, calibration, decision)
            store.create_stream(_header(profile=profile))
            _append(store, range(1))
        (info,) = _infos(folder, 1)
        assert {plane.coding for plane in info.planes[1::2]} == {Coding.QUANTISED}
        assert all((plane.coding is not Coding.QUANTISED) == is_exact for plane in info.planes[::2])
        _, _, (slot,) = _fetch(folder, 1, profile)
        assert torch.equal(LAYOUT.keys(slot), LAYOUT.keys(_slot(0))) == is_exact
        assert not torch.equal(LAYOUT.values(slot), LAYOUT.values(_slot(0)))


def test_new_blocks_have_the_steps_that_were_decided(tmp_path: Path) -> None:
    calibration = _fitted()
    with _open(tmp_path) as store:
        store.calibrations.keep(SPEC, calibration, Decision(calibration.id, 1, "a test", {}, {"q4": (5, -3)}))
        store.create_stream(_header())
        _append(store, range(1))
    (info,) = _infos(tmp_path, 1)
    assert {plane.mult for plane in info.planes[::2]} == {5}
    assert {plane.mult for plane in info.planes[1::2]} == {-3}


def test_earlier_blocks_are_read_after_a_model_was_calibrated_again(tmp_path: Path) -> None:
    _written(tmp_path, range(ENOUGH + 1))
    before = _fetch(tmp_path, ENOUGH + 1)[2]
    calibration = _fitted()
    with _open(tmp_path) as store:
        store.calibrations.keep(SPEC, calibration, Decision(calibration.id, 1024, "a test"))
        _append(store, range(ENOUGH + 1, ENOUGH + 2))
    outcomes, _, after = _fetch(tmp_path, ENOUGH + 2)
    assert set(outcomes) == {Outcome.DISK}
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=False))
    assert len({info.calibration_id for info in _infos(tmp_path, ENOUGH + 2)}) == 3


def test_refuses_calibrations_of_another_shape_and_readers_that_would_store_one(tmp_path: Path) -> None:
    calibration = _fitted()
    decision = Decision(calibration.id, 1024, "a test")
    with _open(tmp_path) as store, pytest.raises(SpecMismatchError):
        store.calibrations.keep(replace(SPEC, kv_heads=2), calibration, decision)
    with _open(tmp_path, Access.READ) as store, pytest.raises(ReadOnlyError):
        store.calibrations.keep(SPEC, calibration, decision)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"version":2}',
        Decision(bytes(15), 1, "").to_json(),
        Decision(bytes(16), 1, "").to_json().replace(b"{}", b"[]"),
        Decision(bytes(16), 1, "", {"q4": 0.5}).to_json().replace(b"0.5", b"NaN"),
        Decision(bytes(16), 1, "", {}, {"q4": (128, 0)}).to_json(),
        Decision(bytes(16), 1, "", {}, {"q4": (1, 0)}).to_json().replace(b"[1,0]", b"[1]"),
    ],
)
def test_what_is_no_decision_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptRecordError, match="decision"):
        Decision.from_json(data)


def test_a_decision_survives_the_catalogue() -> None:
    decision = Decision(bytes(range(16)), 5000, "a text", {"q4": 0.001, "q2": 0.2}, {"q4": (8, -6)}, {"q2": 0.1})
    assert Decision.from_json(decision.to_json()) == decision
