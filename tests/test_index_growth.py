# SPDX-License-Identifier: Apache-2.0
"""Growth of an index: readers beside the writer, and the memory that rows take."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from kvstore.retrieval.index.byte_rows import ByteCoding
from kvstore.retrieval.index.coding import Coding
from kvstore.retrieval.index.float_rows import FloatCoding
from kvstore.retrieval.index.segmented import SegmentedIndex

PARTITIONS, WIDTH, SEGMENT = 2, 12, 32


@pytest.mark.parametrize("coding", [FloatCoding(), ByteCoding()])
def test_readers_see_whole_prefixes_while_rows_are_added(coding: Coding) -> None:
    total, queries = 40 * SEGMENT, torch.randn(PARTITIONS, 1, WIDTH)
    rows = torch.randn(PARTITIONS, total, WIDTH)
    whole = SegmentedIndex(PARTITIONS, WIDTH, coding, SEGMENT)
    whole.add(rows)
    sealed = whole.scores(queries)
    exact = torch.bmm(queries, rows.transpose(1, 2))
    index = SegmentedIndex(PARTITIONS, WIDTH, coding, SEGMENT)
    faults: list[str] = []
    done = threading.Event()

    def read() -> None:
        seen = 0
        while not done.is_set() or seen < total:
            snapshot = index.snapshot()
            scores = snapshot.scores(queries)
            count = scores.shape[2]
            of_body = count - count % SEGMENT
            is_right = torch.equal(scores[:, :, :of_body], sealed[:, :, :of_body]) and torch.allclose(
                scores[:, :, of_body:], exact[:, :, of_body:count], atol=1e-5
            )
            if not is_right or count < seen:
                faults.append(f"{count} rows after {seen}")
                return
            seen = count

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for part in rows.split(5, dim=1):
        index.add(part)
    done.set()
    for reader in readers:
        reader.join(timeout=60)

    assert not any(reader.is_alive() for reader in readers)
    assert faults == []


def test_memory_is_a_byte_per_element_and_grows_without_peaks() -> None:
    partitions, width, batch = 2, 64, 100
    index = SegmentedIndex(partitions, width)
    row = partitions * width
    peaks = []
    for seed in range(100):
        index.add(torch.randn(partitions, batch, width, generator=torch.Generator().manual_seed(seed)))
        peaks.append(index.nbytes - index.num_rows * row)
    # Beyond a byte per element: a tail of float32, and two floats per channel and segment.
    assert max(peaks) <= 1024 * row * 4 + index.num_rows // 1024 * row * 8
    sealed = [sum(part.nbytes for part in segment.rows.parts) for segment in index.dump()[:-1]]
    assert set(sealed) == {1024 * row + 8 * row}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks of memory")
def test_a_long_stream_takes_the_memory_that_is_stated_and_no_more_on_the_way() -> None:
    partitions, width, segments = 4, 128, 200
    index = SegmentedIndex(partitions, width)
    rows = torch.randn(partitions, 1000, width)
    index.add(torch.cat([rows] * 3, dim=1))  # what is allocated once, by torch and for a tail
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, stated = resident_nbytes("VmRSS"), index.nbytes
    for _ in range(segments):
        index.add(rows)
    grown = index.nbytes - stated

    assert grown == pytest.approx(segments * 1000 * partitions * width, rel=0.05)
    assert resident_nbytes("VmRSS") - before <= 1.1 * grown + (8 << 20)
    assert resident_nbytes("VmHWM") - before <= 1.1 * grown + (16 << 20)


def resident_nbytes(field: str) -> int:
    """Memory of this process, now or at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def test_rows_that_are_left_out_give_their_memory_back() -> None:
    index = SegmentedIndex(2, 64)
    index.add(torch.randn(2, 1024, 64))
    index.remove(torch.arange(24, 1024))

    (left,) = index.dump()

    assert sum(part.untyped_storage().nbytes() for part in left.rows.parts) <= 3 * 4096
