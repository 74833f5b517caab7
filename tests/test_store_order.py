# SPDX-License-Identifier: Apache-2.0
"""The order that makes a commit safe: bytes first, then the transaction that names them."""

from __future__ import annotations

from pathlib import Path

from kvstore.config import Durability
from kvstore.native import Arena, DirectFile
from kvstore.tiers.tables.records import unpack_extent_header
from kvstore.tiers.writing.packing import NewRecord
from tests.store_blocks import block_key, make_slot, open_store

BALLAST_NBYTES = 64 << 20


def test_records_are_on_disk_before_anybody_can_name_them(tmp_path: Path) -> None:
    ballast = tmp_path / "ballast"
    ballast.write_bytes(bytes(BALLAST_NBYTES))
    memory = Arena(BALLAST_NBYTES, False)
    with open_store(tmp_path / "store", durability=Durability.NONE) as store:
        # Transfers start in the order of submission: the record's must wait behind these.
        busy = [
            store._pool.submit_read(DirectFile(str(ballast), False), memory, [(0, 0, BALLAST_NBYTES)]) for _ in range(8)
        ]
        assert store._data is not None
        assert store._data.write is not None
        records = store._data.write.records
        (written,), full = records.write([NewRecord(block_key(1), make_slot(1), 40, 0)], keep=())
        records.finish()
        with (tmp_path / "store" / "extents" / "00000000.extents").open("rb") as file:
            file.seek(written.record.extent.offset)
            header = unpack_extent_header(file.read(64))
        assert full is None
        assert (header.key, header.generation) == (block_key(1), written.record.generation)
        records.discard([written])
        for ticket in busy:
            ticket.wait()
