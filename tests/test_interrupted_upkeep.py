# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C just before a commit or just after it, in a process that goes on: nothing that is stored is written over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kvstore.store import Durability, Store
from kvstore.tiers.catalogue import WriteView
from kvstore.tiers.upkeep.compact import Compactor
from kvstore.tiers.upkeep.export_stream import export_stream
from kvstore.tiers.upkeep.import_stream import import_stream
from kvstore.tiers.upkeep.repair import Repairer
from kvstore.tiers.upkeep.transfer import EncodedBlock, RecordTransfer
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    same_block,
)

Result = TypeVar("Result")
PLAIN = range(100, 124)
LATER = range(200, 216)
NUM_BLOCKS = 8


class Interrupts:
    """Raises what Ctrl-C does at the commit of a number, where LMDB's syncs leave room for a signal."""

    def __init__(self, store: Store, at: int, *, after: bool) -> None:
        self._write = store._disk.catalogue.write
        self._left = at
        self._after = after
        self.has_struck = False

    def write(self, work: Callable[[WriteView], Result]) -> Result:
        self._left -= 1
        if self._left != 0:
            return self._write(work)
        self.has_struck = True
        if self._after:
            self._write(work)
        raise KeyboardInterrupt


def _exported(folder: Path) -> Path:
    """A stream that the stores of the test do not hold, in a file."""
    with open_store(folder) as store:
        store.create_stream(replace(HEADER, name="other"))
        store.append("other", make_blocks(NUM_BLOCKS + 4), {})
        store.flush()
        export_stream(store._disk, store._pool, "other", folder / "file")
    return folder / "file"


def _records(folder: Path) -> list[EncodedBlock]:
    with open_store(folder) as store:
        keys = [block_key(number) for number in range(300, 304)]
        store.put(keys, [make_slot(number) for number in range(300, 304)], [40] * 4)
        return [block for block in RecordTransfer(store._disk, store._pool).read(keys) if block is not None]


def _make_changes(folder: Path) -> dict[str, Callable[[Store], Any]]:
    file, records = _exported(folder / "a"), _records(folder / "b")
    return {
        "import": lambda store: import_stream(store._disk, store._pool, file),
        "compact": lambda store: Compactor(store._disk, store._pool, 4 * EXTENT_NBYTES).run(),
        "write records": lambda store: RecordTransfer(store._disk, store._pool).write(records),
        "repair": lambda store: Repairer(store._disk, store._pool).run(),
        "roll back": lambda store: store.rollback("lecture", 40 * (NUM_BLOCKS - 2)),
        "remove blocks": lambda store: store.remove([block_key(number) for number in PLAIN]),
        "remove a stream": lambda store: store.remove_stream("lecture"),
    }


def _check(store: Store) -> None:
    """What is stored is sound, and stays so when more is stored."""
    for _ in range(2):
        report = store.verify()
        assert report.is_clean, report
        assert report.account is not None
        assert (report.account.unaccounted_nbytes, report.account.orphan_nbytes) == (0, 0)
        for number in (*range(NUM_BLOCKS + 4), *PLAIN, *range(300, 304)):
            slot = empty_slot()
            (outcome,) = store.get([block_key(number)], [slot])
            assert not outcome.is_hit or same_block(slot, make_slot(number)), f"block {number} holds other bytes"
        store.put([block_key(number) for number in LATER], [make_slot(number) for number in LATER], [40] * len(LATER))


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_at_any_commit_leaves_free_only_what_nobody_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    for name, change in _make_changes(tmp_path).items():
        for at in count(1):
            path = tmp_path / f"{name} {at}"
            with open_store(path, host_slots=64, durability=Durability.NONE) as store:
                store.create_stream(HEADER)
                store.append("lecture", make_blocks(NUM_BLOCKS), {})
                store.flush()
                store.put([block_key(n) for n in PLAIN], [make_slot(n) for n in PLAIN], [40] * len(PLAIN))
                store.remove([block_key(number) for number in PLAIN[::2]])
                interrupts = Interrupts(store, at, after=after)
                with monkeypatch.context() as patch:
                    patch.setattr(store._disk.catalogue, "write", interrupts.write)
                    try:
                        change(store)
                    except KeyboardInterrupt:
                        pass
                    else:
                        assert not interrupts.has_struck, f"{name} swallowed an interrupt"
                _check(store)
            with open_store(path, durability=Durability.NONE) as store:
                if name == "import":
                    assert not change(store).missing
                _check(store)
            if not interrupts.has_struck:
                break
        assert at > 1, f"{name} makes no commit"
