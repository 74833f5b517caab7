# SPDX-License-Identifier: Apache-2.0
"""Read plans: every piece in exactly one run, neighbours together, limits kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import CorruptRecordError
from kvstore.tiers.base import Extent
from kvstore.tiers.reading.plan import Piece, merge, part_piece, whole_piece

PAGE = 4096

pieces = st.lists(
    st.builds(
        lambda file_id, start, pages: (file_id, start * PAGE, (start + pages) * PAGE),
        st.integers(0, 2),
        st.integers(0, 60),
        st.integers(1, 6),
    ),
    max_size=25,
)


@given(pieces, st.integers(0, 8), st.integers(1, 20))
def test_runs_cover_every_piece_once_and_keep_their_limits(
    spans: list[tuple[int, int, int]], gap_pages: int, max_pages: int
) -> None:
    wanted = [Piece(item, *span) for item, span in enumerate(spans)]
    runs = merge(wanted, gap_nbytes=gap_pages * PAGE, max_nbytes=max_pages * PAGE)
    assert sorted(piece.item for run in runs for piece in run.pieces) == list(range(len(wanted)))
    for run in runs:
        assert all(p.file_id == run.file_id and run.start <= p.start and p.end <= run.end for p in run.pieces)
        assert run.nbytes <= max_pages * PAGE or len(run.pieces) == 1
        reached = run.start
        for piece in run.pieces:
            assert piece.start - reached <= gap_pages * PAGE
            reached = max(reached, piece.end)
        assert reached == run.end


@pytest.mark.parametrize(("gap", "count"), [(0, 2), (PAGE - 1, 2), (PAGE, 1)])
def test_a_gap_is_read_over_up_to_its_limit(gap: int, count: int) -> None:
    wanted = [Piece(0, 0, 0, PAGE), Piece(1, 0, 2 * PAGE, 3 * PAGE)]
    assert len(merge(wanted, gap_nbytes=gap, max_nbytes=1 << 20)) == count


def test_touching_pieces_of_two_files_stay_apart() -> None:
    wanted = [Piece(0, 0, 0, PAGE), Piece(1, 1, PAGE, 2 * PAGE)]
    assert len(merge(wanted, gap_nbytes=PAGE, max_nbytes=1 << 20)) == 2


@pytest.mark.parametrize(
    ("offset", "nbytes", "start", "end"),
    [(0, 1, 0, 1), (4032, 1, 1, 2), (4031, 1, 0, 1), (4031, 2, 0, 2), (8000, 224, 1, 3), (0, 4 * PAGE - 64, 0, 4)],
)
def test_a_part_covers_its_bytes_in_whole_pages(offset: int, nbytes: int, start: int, end: int) -> None:
    piece = part_piece(7, Extent(3, 10 * PAGE, 4 * PAGE), offset, nbytes)
    assert piece == Piece(7, 3, (10 + start) * PAGE, (10 + end) * PAGE)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 4 * PAGE - 63), (4 * PAGE, 1), (-1, 4), (0, -1)])
def test_a_part_that_leaves_its_extent_is_corrupt(offset: int, nbytes: int) -> None:
    with pytest.raises(CorruptRecordError):
        part_piece(0, Extent(0, 0, 4 * PAGE), offset, nbytes)


def test_a_whole_extent_is_one_piece() -> None:
    assert whole_piece(1, Extent(2, PAGE, 2 * PAGE)) == Piece(1, 2, PAGE, 3 * PAGE)
