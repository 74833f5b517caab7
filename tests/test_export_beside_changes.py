# SPDX-License-Identifier: Apache-2.0
"""An export while its stream changes, or that is interrupted: a file of what was there when it began, or no file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.tiers.upkeep.export_stream import export_stream
from kvstore.tiers.upkeep.import_stream import import_stream
from tests.store_blocks import HEADER, block_key, make_blocks, make_slot, open_store

NUM_BLOCKS = 4


def test_an_entry_never_gets_the_summary_of_one_that_came_later(tmp_path: Path) -> None:
    with open_store(tmp_path / "here") as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(NUM_BLOCKS), {})
        store.flush()
        later = [
            replace(block, entry=replace(block.entry, key=block_key(10 + n)), slot=make_slot(10 + n), summary=b"other")
            for n, block in enumerate(make_blocks(2, 2), start=2)
        ]

        def change(done: int, total: int) -> None:
            if done == total:  # the blocks are in the file, the entries are not yet
                store.rollback("lecture", 80)
                store.append("lecture", later, {})
                store.flush()

        assert not export_stream(store._disk, store._pool, "lecture", tmp_path / "file", change).missing
    with open_store(tmp_path / "there") as store:
        import_stream(store._disk, store._pool, tmp_path / "file")
        assert [entry.key for entry in store.manifest("lecture").entries] == [block_key(n) for n in range(NUM_BLOCKS)]
        assert store.summaries("lecture", 0, NUM_BLOCKS) == {0: b"summary 0", 1: b"summary 1"}
        assert store.verify().is_clean


def test_an_interrupted_export_leaves_no_file(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with open_store(tmp_path / "here") as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(NUM_BLOCKS), {})
        store.flush()
        with pytest.raises(KeyboardInterrupt):
            export_stream(store._disk, store._pool, "lecture", tmp_path / "file", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
