# SPDX-License-Identifier: Apache-2.0
"""Late interaction over one stream: indexes its blocks, stores what it has indexed, and ranks blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kvstore.layout import BlockLayout
from kvstore.retrieval.late.directory import Directory
from kvstore.retrieval.late.piece import PieceHead, seal
from kvstore.retrieval.late.rows import TokenRows, directions_of, unpack_rows
from kvstore.retrieval.late.tail import Tail
from kvstore.retrieval.maxsim import LateInteraction, maxsim
from kvstore.retrieval.selection import Ranking
from kvstore.session.late.keys import BlockKeys
from kvstore.session.late.pieces import LatePieces
from kvstore.store import Entries, Store, StreamHeader

_BATCH = 16
_BATCH_TOKENS = 64
"""Of a question, that are compared with all rows at once: turns of a chat have hundreds."""
_SEALED_LOST = "its keys could not be read when it was indexed"
_ROWS_LOST = "its rows of the index are damaged"


class LateRanking:
    """Ranks the blocks of one stream.

    Rows of the last blocks are in memory; those before are in pieces, which are objects of the stream, and of them only
    which words stand in which blocks is in memory. Whoever appends seals and stores a piece when it has enough rows;
    others read the pieces, and the keys of the blocks behind the last one. A piece that is not stored is made from its
    blocks' keys: by a writer, who stores it, or, kept in memory, by a reader who has waited for it in vain.

    A block that cannot be read is not found, which is no error: `damaged` says why, by the block's index.

    Args:
        store: the open store.
        header: the stream's header.
        rule: which layers are compared, and how.
        is_kept: the index is stored beside the stream; else it is in memory alone, as of blocks of several streams.
    """

    @torch.inference_mode(False)  # its memory is written in every mode
    def __init__(self, store: Store, header: StreamHeader, rule: LateInteraction, *, is_kept: bool = True) -> None:
        self._store, self._name, self._is_kept = store, header.name, is_kept
        self._rule = rule
        self.layers = rule.layers(header.spec.num_layers)
        self._part_dim = header.spec.kv_heads * header.spec.key_dim
        self._width = len(self.layers) * self._part_dim
        self._keys = BlockKeys(store, BlockLayout(header.spec, header.block_tokens), self.layers)
        self.damaged = self._keys.damaged
        self._begin()

    def _begin(self) -> None:
        """Know nothing of the stream."""
        self._pieces = LatePieces(self._store, self._name, self.layers)
        self._directory = Directory(self._part_dim)
        self._tail = Tail(len(self.layers), self._part_dim, self._rule.piece_tokens)
        self._ends: list[int] = []
        self._in_memory: dict[int, tuple[TokenRows, Tensor]] = {}
        self._start: int | None = None

    @torch.inference_mode(False)
    def refresh(self, num_sink_blocks: int, entries: Entries, fresh: Mapping[int, Tensor] | None = None) -> None:
        """Index the stream's blocks that are not indexed yet.

        Args:
            num_sink_blocks: leading blocks to leave out: they are attended always.
            entries: the stream's entries from the first one on.
            fresh: slots, uint8, of blocks that may not be durable yet, by index; all others are.
        """
        try:
            self._index(num_sink_blocks, entries, fresh or {})
        except BaseException:  # Ctrl-C too: rows that have left the tail may be in no piece yet
            self._begin()
            raise

    def _index(self, num_sink_blocks: int, entries: Entries, fresh: Mapping[int, Tensor]) -> None:
        if self._start is None:
            if len(entries) <= num_sink_blocks:
                return
            self._start = num_sink_blocks
        while (end := self._piece_end(entries)) is not None:
            first = self._ends[-1] if self._ends else self._start
            head = self._pieces.head(len(self._ends), len(self.layers), self._part_dim) if self._is_kept else None
            if head is not None and (head.first_block, head.end_block) == (first, end) and self._fits(head, entries):
                self._adopt(head)
                continue
            waited = int(entries.sizes[first:].sum()) >= 2 * self._rule.piece_tokens
            if self._is_kept and not self._store.is_writable and not waited:
                break  # who appends is about to store it
            self._take(entries, end, fresh)
            self._seal(first, end)
        self._take(entries, len(entries), fresh)

    @torch.inference_mode(False)
    def rank(self, question: Tensor, num_blocks: int) -> Ranking:
        """Rank the blocks for all layers at once.

        Args:
            question: [num_tokens, num_parts, kv_heads * key_dim] float32 pre-RoPE keys of the question in the layers
                that `layers` names.
            num_blocks: blocks of the stream; those never indexed rank last with score 0.
        """
        directions = directions_of(question, self._tail.mean)
        found = list(self._rows(directions, num_blocks))
        rows = TokenRows.joined([rows for _, rows, _ in found], self._width)
        blocks = torch.tensor([block for block, _, _ in found], dtype=torch.int64)
        row_blocks = blocks.repeat_interleave(torch.tensor([rows.num_rows for _, rows, _ in found], dtype=torch.int64))
        words = torch.cat([torch.empty(0, dtype=torch.int64), *(words for _, _, words in found)])
        weights, hits = self._weights(words), self._rule.hits_per_token
        batches = directions.split(_BATCH_TOKENS)
        found_of = [maxsim(rows.products(some), row_blocks, weights, hits) for some in batches]
        scores = torch.stack([scores for _, scores in found_of]).sum(dim=0)
        return _ranked(found_of[0][0], scores, num_blocks)

    def _rows(self, directions: Tensor, num_blocks: int) -> Iterator[tuple[int, TokenRows, Tensor]]:
        """Yield the blocks that are looked at, with their rows and the words of these; -1 in the tail."""
        part = directions[:, : self._part_dim]
        chosen: list[int] = []
        if self._ends and directions.shape[0]:
            rule = self._rule
            chosen = self._directory.candidates(part, rule.hits_per_token, rule.num_candidates, num_blocks)
        yield from self._sealed_rows(chosen)
        for block, rows in self._tail.rows():
            if block < num_blocks and rows.num_rows:
                yield block, rows, torch.full((rows.num_rows,), -1)

    def _sealed_rows(self, blocks: list[int]) -> Iterator[tuple[int, TokenRows, Tensor]]:
        wanted: dict[int, list[int]] = {}
        firsts = [self._start or 0, *self._ends]
        ends = torch.tensor(self._ends)
        for block in blocks:
            if block in self._in_memory:
                yield (block, *self._in_memory[block])
            elif self._directory.num_rows(block):
                wanted.setdefault(int(torch.searchsorted(ends, block, right=True)), []).append(block)
        asked = [(piece, [block - firsts[piece] for block in of_piece]) for piece, of_piece in wanted.items()]
        for of_piece, parts in zip(wanted.values(), self._pieces.rows(asked) if asked else [], strict=True):
            for block, data in zip(of_piece, parts, strict=True):
                found = None if data is None else unpack_rows(data, self._directory.num_rows(block), self._width)
                if found is None:
                    self.damaged[block] = _ROWS_LOST
                else:
                    self.damaged.pop(block, None)
                    yield (block, *found)

    def _weights(self, words: Tensor) -> Tensor:
        """How many tokens of the stream each row stands for: of a word, those that are looked at stand for all."""
        weights = torch.ones(words.shape[0])
        is_sealed = words >= 0
        of_word = self._directory.rows_of_word
        some = words[is_sealed].clamp_max(of_word.shape[0] - 1)
        looked_at = torch.bincount(some, minlength=of_word.shape[0])
        weights[is_sealed] = (of_word[some] / looked_at[some]).clamp_min(1)
        return weights

    def _piece_end(self, entries: Entries) -> int | None:
        """The block behind the next piece; None while too few tokens are there."""
        assert self._start is not None, "set before"
        first = self._ends[-1] if self._ends else self._start
        # A block holds a token at least, so no piece has more blocks.
        sums = entries.sizes[first : first + self._rule.piece_tokens].cumsum(0)
        number = int(torch.searchsorted(sums, self._rule.piece_tokens))
        return first + number + 1 if number < sums.shape[0] else None

    def _fits(self, head: PieceHead, entries: Entries) -> bool:
        """Whether a stored piece is of these blocks; one that was lost has no rows."""
        sizes, rows = entries.sizes[head.first_block : head.end_block], head.rows_of_block
        return bool(((rows == sizes) | (rows == 0)).all())

    def _adopt(self, head: PieceHead) -> None:
        self._directory.add(head, is_stored=True)
        self._ends.append(head.end_block)
        self._tail.fix(head.mean)
        self._tail.take_until(head.end_block)
        for number in (head.rows_of_block == 0).nonzero()[:, 0].tolist():
            self.damaged[head.first_block + number] = _SEALED_LOST

    def _seal(self, first: int, end: int) -> None:
        """Make a piece of the tail's first blocks."""
        blocks = self._tail.take_until(end)
        head, words = seal(self._directory.vocabulary, self._tail.mean, first, blocks)
        self._directory.add(head, is_stored=False)
        if self._is_kept and self._store.is_writable:
            self._pieces.put(len(self._ends), head, blocks, words)
        else:
            self._in_memory |= dict(zip(range(first, end), zip(blocks, words, strict=True), strict=True))
        self._ends.append(end)

    def _take(self, entries: Entries, end: int, fresh: Mapping[int, Tensor]) -> None:
        """Bring blocks up to a number to the tail."""
        assert self._start is not None, "set before"
        first = max(self._start, self._ends[-1] if self._ends else 0, self._tail.end_block)
        for at in range(first, end, _BATCH):
            for entry, keys in self._keys.of(list(entries[at : min(at + _BATCH, end)]), fresh):
                self._tail.add(entry.index, entry.num_tokens, keys)


def _ranked(numbers: Tensor, scores: Tensor, num_blocks: int) -> Ranking:
    """Blocks that earned something by score, then all others as they come: to sort those takes long."""
    numbers, scores = numbers[scores > 0], scores[scores > 0]
    best = Ranking.of(scores)
    is_other = torch.ones(num_blocks, dtype=torch.bool)
    is_other[numbers] = False
    others = is_other.nonzero()[:, 0]
    return Ranking(torch.cat([numbers[best.blocks], others]), torch.cat([best.scores, torch.zeros(others.shape[0])]))
