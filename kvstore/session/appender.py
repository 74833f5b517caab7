# SPDX-License-Identifier: Apache-2.0
"""The growing end of a stream: cuts tokens into blocks, fills their slots, names, summarises and hands them on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.layout import BlockLayout
from kvstore.retrieval.retention.thinning import Thinning
from kvstore.retrieval.tokens import Rotate
from kvstore.session.residency import Residency
from kvstore.session.thinned import SlotTokens, thin
from kvstore.spec import BlockKey, chain_key
from kvstore.store import Entry, NewBlock

Summarise = Callable[[Tensor, Tensor, int], bytes]
"""(positions [rows, num_tokens], received mass [num_layers, kv_heads, num_tokens], first token) -> stored summary."""


def payload_of(ids: Tensor) -> bytes:
    """What names tokens in the key of their block: `ids` `[num_tokens]` int64, 8 bytes each."""
    return ids.to("cpu", torch.int64).numpy().astype("<i8").tobytes()


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of coming tokens that forms one block: its media span in seconds and its frame group."""

    num_tokens: int
    start_s: float
    end_s: float
    group: int


@dataclass(slots=True)
class OpenBlock:
    """A block that still has room, or that is complete but not handed on yet.

    Args:
        slot_idx: its slot in the device pool.
        segment: its size and span.
        received: [num_layers, kv_heads, num_tokens] float32 attention mass so far.
        is_announced: whether somebody asked for this segment; else it is the default.
        filled: tokens written (or about to be, in the running forward).
        ids: content ids of its tokens.
        positions: [rows, count] int64 pieces.
    """

    slot_idx: int
    segment: Segment
    received: Tensor
    is_announced: bool
    filled: int = 0
    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every token of the segment is there."""
        return self.filled == self.segment.num_tokens


@dataclass(frozen=True, slots=True)
class _Piece:
    block: OpenBlock
    row: int
    first: int
    count: int


class Appender:
    """Writes the tokens of running forwards into slots and turns full slots into blocks.

    A stream that is thinned is so run by run: complete blocks wait whole until they are a run, then all of them are
    thinned together and handed on. What is kept decides the name of a block with what it was made from.

    Args:
        residency: device slots.
        namespace: what else, beside content, names a block: see `chain_key`.
        summarise: makes a block's stored summary.
        last: the stream's last entry, None for an empty stream.
        thinning: what is left out; None for nothing.
        rotate: the model's rotary function, for what leaves tokens out; None where keys are stored rotated.
    """

    def __init__(
        self,
        residency: Residency,
        namespace: str,
        summarise: Summarise,
        last: Entry | None,
        thinning: Thinning | None = None,
        rotate: Rotate | None = None,
    ) -> None:
        self._residency = residency
        self._layout: BlockLayout = residency.pool.layout
        self._namespace = namespace
        self._summarise = summarise
        self._thinning = thinning
        self._rotate = rotate
        self._parent: BlockKey | None = last.key if last else None
        self._next_index = last.index + 1 if last else 0
        self._next_token = last.first_token + last.num_tokens if last else 0
        self._segments: deque[Segment] = deque()
        self._open: list[OpenBlock] = []
        self._pieces: list[_Piece] = []
        self._votes: list[Tensor] = []
        """By layer, mass that the open tokens got from the last forward: it counts unless that is dropped."""
        self._num_voting = 0

    @property
    def open_blocks(self) -> Sequence[OpenBlock]:
        """Blocks not yet handed on, in order; the last may have room."""
        return self._open

    @property
    def num_open_tokens(self) -> int:
        """Tokens in `open_blocks`."""
        return sum(block.filled for block in self._open)

    @property
    def is_waiting(self) -> bool:
        """Whether complete blocks wait for others to be thinned with."""
        return bool(self._open) and self._open[0].is_complete

    def segment(self, segment: Segment) -> None:
        """Announce how coming tokens are to be cut; without announcements blocks are of `block_tokens`.

        Raises:
            ConfigError: the segment is empty or larger than a slot.
        """
        if not 1 <= segment.num_tokens <= self._layout.block_tokens:
            raise ConfigError(f"a block of {segment.num_tokens} tokens; it must hold 1 to {self._layout.block_tokens}")
        self._segments.append(segment)

    def begin(self, ids: Tensor, positions: Tensor) -> None:
        """Find room for the tokens of a forward; the same rows are then written in every layer.

        Args:
            ids: [num_tokens] int64: token ids, or content hashes where tokens have no id of their own.
            positions: [rows, num_tokens] int64 RoPE positions.
        """
        self._count_votes()
        self._pieces = []
        first, num_tokens = 0, ids.shape[0]
        self._num_voting = num_tokens
        while first < num_tokens:
            if not self._open or self._open[-1].is_complete:
                self._open.append(self._new_block())
            block = self._open[-1]
            count = min(block.segment.num_tokens - block.filled, num_tokens - first)
            self._pieces.append(_Piece(block, block.filled, first, count))
            block.ids.append(ids[first : first + count].cpu())
            block.positions.append(positions[:, first : first + count].cpu())
            block.filled += count
            first += count

    def _new_block(self) -> OpenBlock:
        slot_idx, spec = self._residency.take_slot(), self._layout.spec
        is_announced = bool(self._segments)
        segment = self._segments.popleft() if is_announced else Segment(self._layout.block_tokens, 0.0, 0.0, -1)
        device = self._residency.pool.device
        received = torch.zeros(spec.num_layers, spec.kv_heads, segment.num_tokens, device=device)
        return OpenBlock(slot_idx, segment, received, is_announced)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store one layer of the running forward's tokens.

        Args:
            layer: layer index.
            keys: [kv_heads, num_tokens, key_dim] in the stream's key space.
            values: [kv_heads, num_tokens, value_dim].
        """
        pool = self._residency.pool
        for piece in self._pieces:
            rows = slice(piece.row, piece.row + piece.count)
            source = slice(piece.first, piece.first + piece.count)
            pool.keys(piece.block.slot_idx)[layer, :, rows].copy_(keys[:, source])
            pool.values(piece.block.slot_idx)[layer, :, rows].copy_(values[:, source])

    def receive(self, mass: Tensor) -> None:
        """Note the attention mass `[kv_heads, num_open_tokens]` float32 that the open tokens got in the next layer."""
        self._votes.append(mass)

    def _count_votes(self) -> None:
        for layer, mass in enumerate(self._votes):
            first = 0
            for block in self._open:
                block.received[layer, :, : block.filled] += mass[:, first : first + block.filled]
                first += block.filled
        self._votes.clear()

    def end(self, num_spare: int) -> None:
        """Note that every layer of the running forward is written, and forget its last tokens, which filled it up."""
        self._pieces = []
        self.drop(num_spare)

    def abandon(self) -> int:
        """Forget the tokens of a forward that has begun and not ended; returns how many there were."""
        unfinished = sum(piece.count for piece in self._pieces)
        self._pieces = []
        self.drop(unfinished)
        return unfinished

    def drop(self, num_tokens: int) -> None:
        """Forget the last tokens; if somebody asked for a block that becomes empty, it is still to come.

        Raises:
            ConfigError: some of them have been handed on already.
        """
        if num_tokens > self.num_open_tokens:
            raise ConfigError(f"cannot drop {num_tokens} tokens; only {self.num_open_tokens} are not stored yet")
        if num_tokens >= self._num_voting:
            self._votes.clear()
        self._num_voting = max(0, self._num_voting - num_tokens)
        while num_tokens:
            block = self._open[-1]
            count = min(block.filled, num_tokens)
            block.filled -= count
            block.ids = [torch.cat(block.ids)[: block.filled]]
            block.positions = [torch.cat(block.positions, dim=1)[:, : block.filled]]
            block.received[:, :, block.filled :] = 0
            num_tokens -= count
            if block.filled == 0:
                if block.is_announced:
                    self._segments.appendleft(block.segment)
                self._residency.pool.free(self._open.pop().slot_idx)

    def finish(self) -> list[NewBlock]:
        """Take the complete blocks off, unless they wait: named, summarised, and adopted (pinned) by the residency."""
        complete = [block for block in self._open if block.is_complete]
        if self._thinning is not None and self._is_thinned(complete):
            least = self._layout.block_tokens // 4  # small blocks take a slot all the same
            if sum(max(block.filled, least) for block in complete) < self._thinning.run_tokens:
                return []
        return self._close(len(complete))

    def close_partial(self) -> list[NewBlock]:
        """Take all blocks off, the last one too even if it has room."""
        if self._open and not self._open[-1].is_complete:
            block = self._open[-1]
            block.segment = replace(block.segment, num_tokens=block.filled)
            block.received = block.received[:, :, : block.filled]
        return self._close(len(self._open))

    def _is_thinned(self, run: Sequence[OpenBlock]) -> bool:
        groups = [block.segment.group for block in run]
        return self._thinning is not None and bool(groups) and self._thinning.concerns(groups)

    def _close(self, count: int) -> list[NewBlock]:
        if count:
            self._count_votes()
        run = [
            SlotTokens(block.slot_idx, torch.cat(block.positions, dim=1), block.received, block.segment.group)
            for block in self._open[:count]
        ]
        kept: Sequence[Tensor | None] = [None] * count
        if self._thinning is not None and self._is_thinned(self._open[:count]):
            kept = thin(self._residency.pool, self._thinning, run, self._next_token, self._rotate)
        return [self._close_one(self._open.pop(0), tokens, places) for tokens, places in zip(run, kept, strict=True)]

    def _close_one(self, block: OpenBlock, tokens: SlotTokens, kept: Tensor | None) -> NewBlock:
        segment, spec, space = block.segment, self._layout.spec, self._namespace
        positions, received, num_tokens = tokens.positions, tokens.received.cpu(), segment.num_tokens
        if kept is not None and kept.shape[0] < num_tokens:
            positions, received, num_tokens = positions[:, kept], received[:, :, kept], kept.shape[0]
            space = f"{space};kept={','.join(map(str, kept.tolist()))}"
        key = chain_key(self._parent, payload_of(torch.cat(block.ids)), space)
        entry = Entry(
            self._next_index, key, num_tokens, self._next_token, segment.start_s, segment.end_s, segment.group
        )
        summary = self._summarise(positions, received, self._next_token)
        self._residency.adopt(key, block.slot_idx, spec.num_layers)
        self._parent, self._next_index, self._next_token = key, entry.index + 1, entry.first_token + entry.num_tokens
        return NewBlock(entry, self._residency.bytes_of(block.slot_idx), summary)
