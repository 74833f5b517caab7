# SPDX-License-Identifier: Apache-2.0
"""Exported files whose checksums are right and whose blocks are not: no key gets bytes that cannot be decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore.decision import Decision
from kvstore.errors import CorruptRecordError
from kvstore.store import Access, FetchRequest, Outcome, Profile, Store
from kvstore.tiers.upkeep.container import Chunk, ContainerReader, ContainerWriter, Kind
from kvstore.tiers.upkeep.export_stream import export_stream
from kvstore.tiers.upkeep.import_stream import import_stream
from tests.codec_slots import fitted
from tests.store_blocks import HEADER, LAYOUT, SPEC, block_key, empty_slot, make_blocks, open_store


def _export(store: Store, path: Path) -> Path:
    export_stream(store._disk, store._pool, "lecture", path)
    return path


def _changed(source: Path, target: Path, change: Callable[[Chunk], bytes | None]) -> Path:
    """The same file, made by somebody who changes payloads, or leaves chunks out, and gets all checksums right."""
    with source.open("rb") as file, target.open("wb") as out:
        reader, writer = ContainerReader(file, source.name), ContainerWriter(out)
        while (chunk := reader.next()).kind is not Kind.END:
            payload = change(chunk)
            if payload is not None:
                writer.write(chunk.kind, payload)
        writer.end()
    return target


def test_a_block_that_cannot_be_decoded_is_not_stored_under_the_key_of_a_sound_one(tmp_path: Path) -> None:
    with open_store(tmp_path / "here") as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(4), {})
        store.flush()
        file = _export(store, tmp_path / "file")

    def damage_planes(chunk: Chunk) -> bytes:
        return chunk.payload[:-4000] + bytes(4000) if chunk.kind is Kind.BLOCK else chunk.payload

    made_up = _changed(file, tmp_path / "made up", damage_planes)
    with open_store(tmp_path / "there") as store:
        with pytest.raises(CorruptRecordError, match="cannot be decoded"):
            import_stream(store._disk, store._pool, made_up, "other")
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(4), {})
        store.flush()
    with open_store(tmp_path / "there") as store:
        requests = [FetchRequest(block_key(number), empty_slot()) for number in range(4)]
        assert store.fetch(requests).outcomes == [Outcome.DISK] * 4


def _slot(seed: int) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    slot = empty_slot()
    for part in (LAYOUT.keys(slot), LAYOUT.values(slot)):
        part.copy_(torch.randn(part.shape, generator=chance))
    return slot


def test_blocks_whose_calibration_is_not_in_the_file_are_missing_and_the_others_are_there(tmp_path: Path) -> None:
    header = replace(HEADER, profile=Profile.Q4)
    blocks = [replace(block, slot=_slot(number)) for number, block in enumerate(make_blocks(2))]
    calibration = fitted([(LAYOUT.keys(_slot(9)), LAYOUT.values(_slot(9)))])

    def open_lossy(path: Path) -> Store:
        return Store.open(path, access=Access.WRITE, layout=LAYOUT, profile=Profile.Q4, host_nbytes=1 << 20)

    with open_lossy(tmp_path / "here") as store:
        store.create_stream(header)
        store.append("lecture", blocks[:1], {})
        store.flush()
        store.calibrations.keep(SPEC, calibration, Decision(calibration.id, 1024, "a test"))
        store.append("lecture", blocks[1:], {})
        store.flush()
        file = _export(store, tmp_path / "file")
    with open_lossy(tmp_path / "whole") as store:
        assert import_stream(store._disk, store._pool, file).missing == []
    without = _changed(
        file, tmp_path / "without", lambda c: None if c.kind in (Kind.CALIBRATION, Kind.DECISION) else c.payload
    )
    with open_lossy(tmp_path / "there") as store:
        assert import_stream(store._disk, store._pool, without).missing == [block_key(1)]
        assert store.exists([block_key(0), block_key(1)]) == [True, False]
        assert import_stream(store._disk, store._pool, file).missing == [], "the whole file brings it back"
        assert store.verify().is_clean
