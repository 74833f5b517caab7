# SPDX-License-Identifier: Apache-2.0
"""The part of a stream that one layer attends to: which tokens, for which KV heads, read and in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import CorruptRecordError
from kvstore.session.residency import LoadReport, Residency
from kvstore.store import Entry

_RUN_TOKENS = 16
"""Mean length from which on runs are copied one by one: a copy costs about as much as this many rows by index."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Tokens to read, by role; numbers are those of the stream.

    Args:
        far: sinks and what was retrieved: [num_tokens] int64, ascending; one tensor for all KV heads, or one for each.
        near: the recent window, likewise, for all KV heads.
    """

    far: tuple[Tensor, ...]
    near: Tensor

    @staticmethod
    def of(sinks: Sequence[Entry], chosen: Sequence[Tensor], near: Sequence[Entry]) -> Reading:
        """Join sinks, tokens that were chosen, and the window's blocks."""
        first = _tokens_of(sinks)
        return Reading(tuple(torch.cat([first, tokens]) for tokens in chosen or [first[:0]]), _tokens_of(near))


@dataclass(frozen=True, slots=True)
class PastTokens:
    """What was read, in rows of equal length; shorter lists end in rows that nobody may see.

    Args:
        numbers: [num_lists, num_rows] int64: far tokens first; -1 where a list is shorter; 1 list, or one per KV head.
        positions: [position rows, num_lists, num_rows] int64, 0 where a list is shorter.
        num_far: rows of the far part.
        keys: by layer: [kv_heads, num_rows, key_dim].
        values: by layer: [kv_heads, num_rows, value_dim].
        blocks: indices of the blocks that the tokens are in.
    """

    numbers: Tensor
    positions: Tensor
    num_far: int
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    blocks: frozenset[int]


@dataclass(frozen=True, slots=True)
class BlockPositions:
    """RoPE positions of some blocks.

    Args:
        is_had: [num_blocks] bool: those that could be read.
        table: [position rows, num_blocks, most tokens] int64; None where tokens are at their own numbers.
        rows: rows of a position.
    """

    is_had: Tensor
    table: Tensor | None
    rows: int

    def at(self, block: Tensor, row: Tensor, numbers: Tensor) -> Tensor:
        """Positions of tokens by block, row in it and number, `[...]` int64 each: `[position rows, ...]` int64."""
        if self.table is None or not self.is_had.shape[0]:
            return numbers.expand(self.rows, *numbers.shape)
        return self.table[:, block, row]


class PastReader:
    """Loads blocks and gathers rows of them, block table in hand; a block that cannot be had is left out.

    More blocks than the device pool has room for are read in several turns.

    Args:
        residency: where blocks come to the device.
        rows: rows of a position: 1, or 3 for M-RoPE.
        has_positions: whether positions are stored: they are not the numbers of the tokens.
    """

    def __init__(self, residency: Residency, rows: int, *, has_positions: bool) -> None:
        self._residency = residency
        self._rows = rows
        self._has_positions = has_positions

    def read(
        self,
        reading: Reading,
        entries: Sequence[Entry],
        firsts: Tensor,
        positions: Callable[[Entry], Tensor],
        layers: range,
        report: LoadReport,
        timeout_s: float | None = None,
    ) -> PastTokens:
        """Bring tokens together.

        Args:
            reading: which.
            entries: the stream's entries, from the first one on.
            firsts: [num_entries] int64: number of the first token of each.
            positions: [position rows, num_tokens] int64 of a block; one whose positions cannot be read is left out.
            layers: layers wanted.
            report: is added to.
            timeout_s: see `Residency.load`.
        """
        numbers, num_far = _table(reading)
        block = torch.searchsorted(firsts, numbers, right=True) - 1
        present = numbers >= 0
        used, place = torch.unique(block[present], return_inverse=True)
        where = torch.zeros_like(numbers)
        where[present] = place
        row = (numbers - firsts[block.clamp_min(0)]).clamp_min(0) if len(entries) else numbers
        named = [entries[index] for index in used.tolist()]
        table = self.positions_of_blocks(named, positions, report)
        had = table.is_had
        pieces = self._pieces(present, layers)
        step = max(1, self._residency.num_unpinned)
        wanted = [number for number, is_had in enumerate(had.tolist()) if is_had]
        for start in range(0, len(wanted), step):
            part = wanted[start : start + step]
            loaded = self._residency.load([named[number].key for number in part], layers, timeout_s)
            report.add(loaded)
            found = [number for number in part if named[number].key not in loaded.lost]
            try:
                slots = torch.full((len(named),), -1, dtype=torch.int64)
                for number in found:
                    slots[number] = self._residency.slot_of(named[number].key)
                takes = present & (slots[where] >= 0) if named else present
                self._gather(pieces, layers, takes, slots[where], row)
            finally:
                self._residency.unpin([named[number].key for number in found])
            had[[number for number in part if number not in set(found)]] = False
        at = table.at(where, row, numbers)
        blocks = frozenset(index for index, is_had in zip(used.tolist(), had.tolist(), strict=True) if is_had)
        if named and not bool(had.all()):
            return self._without(numbers, present & had[where], at, num_far, pieces, layers, blocks)
        keys, values = (dict(zip(layers, outs, strict=True)) for outs in pieces)
        return PastTokens(numbers, at * present, num_far, keys, values, blocks)

    def positions_of_blocks(
        self, named: Sequence[Entry], positions: Callable[[Entry], Tensor], report: LoadReport
    ) -> BlockPositions:
        """RoPE positions of blocks; those that cannot be read are reported as lost."""
        had = torch.ones(len(named), dtype=torch.bool)
        if not self._has_positions:
            return BlockPositions(had, None, self._rows)
        longest = max((entry.num_tokens for entry in named), default=0)
        table = torch.zeros(self._rows, len(named), longest, dtype=torch.int64)
        for number, entry in enumerate(named):
            try:
                table[:, number, : entry.num_tokens] = positions(entry)
            except CorruptRecordError as error:
                had[number] = False
                report.lost[entry.key] = str(error)
        return BlockPositions(had, table, self._rows)

    def _pieces(self, present: Tensor, layers: range) -> tuple[Tensor, Tensor]:
        """Room for keys and values, `[num_layers, kv_heads, num_rows, dim]`; zeros where not all rows are filled."""
        pool, spec = self._residency.pool, self._residency.pool.layout.spec
        make = torch.empty if bool(present.all()) else torch.zeros
        like, shape = pool.keys(0), (len(layers), spec.kv_heads, present.shape[1])
        keys, values = (
            make(*shape, dim, dtype=like.dtype, device=like.device) for dim in (spec.key_dim, spec.value_dim)
        )
        return keys, values

    def _gather(self, pieces: tuple[Tensor, Tensor], layers: range, takes: Tensor, slots: Tensor, row: Tensor) -> None:
        """Copy the rows that `takes` says, `[num_lists, num_rows]`, out of their slots."""
        pool = self._residency.pool
        lists, rows = takes.nonzero(as_tuple=True)
        slot, token = slots[lists, rows], row[lists, rows]
        if takes.shape[0] == 1 and rows.shape[0]:
            breaks = ((slot.diff() != 0) | (token.diff() != 1) | (rows.diff() != 1)).nonzero()[:, 0] + 1
            if breaks.shape[0] * _RUN_TOKENS <= rows.shape[0]:  # as of whole blocks, in all layers at once
                starts = [0, *breaks.tolist()]
                counts = torch.tensor([*starts, rows.shape[0]]).diff().tolist()
                runs = torch.stack([rows, slot, token])[:, starts].T.tolist()
                for (first, place, start), count in zip(runs, counts, strict=True):
                    for outs, sources in zip(pieces, pool.planes, strict=True):
                        of_block = sources[place, layers.start : layers.stop, :, start : start + count]
                        outs[:, :, first : first + count] = of_block
                return
        lists, rows, slot, token = (each.to(pool.device) for each in (lists, rows, slot, token))
        for outs, sources in zip(pieces, pool.planes, strict=True):
            for layer, out in zip(layers, outs, strict=True):
                if takes.shape[0] == 1:
                    out[:, rows] = sources[slot, layer, :, token].transpose(0, 1)
                else:
                    out[lists, rows] = sources[slot, layer, lists, token]

    def _without(
        self,
        numbers: Tensor,
        stays: Tensor,
        at: Tensor,
        num_far: int,
        pieces: tuple[Tensor, Tensor],
        layers: range,
        blocks: frozenset[int],
    ) -> PastTokens:
        """Close up the gaps that lost blocks left: what follows takes their places."""
        far, near = _closed_up(stays[:, :num_far]), _closed_up(stays[:, num_far:]) + num_far
        order = torch.cat([far, near], dim=1)
        there = order.ge(0) & torch.cat([far >= 0, near >= num_far], dim=1)
        order = order.clamp(0, max(numbers.shape[1] - 1, 0))
        heads, device = pieces[0].shape[1], self._residency.pool.device
        index = order.expand(heads, -1).to(device)[:, :, None]
        is_gone = ~stays.expand(heads, -1).to(device)[:, :, None]  # never filled: nobody sees it, and 0 times it is 0
        keys, values = (
            {
                layer: out.masked_fill(is_gone, 0).gather(1, index.expand(-1, -1, out.shape[2]))
                for layer, out in zip(layers, outs, strict=True)
            }
            for outs in pieces
        )
        moved = numbers.gather(1, order).masked_fill(~there, -1)
        where = at.gather(2, order.expand(at.shape[0], -1, -1)) * there
        return PastTokens(moved, where, far.shape[1], keys, values, blocks)


def _tokens_of(entries: Sequence[Entry]) -> Tensor:
    runs = [torch.arange(entry.first_token, entry.first_token + entry.num_tokens) for entry in entries]
    return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)


def _table(reading: Reading) -> tuple[Tensor, int]:
    """Far tokens of all lists, padded at the end to the longest, then the near ones."""
    num_far = max(tokens.shape[0] for tokens in reading.far)
    far = torch.full((len(reading.far), num_far), -1, dtype=torch.int64)
    for number, tokens in enumerate(reading.far):
        far[number, : tokens.shape[0]] = tokens
    return torch.cat([far, reading.near.expand(len(reading.far), -1)], dim=1), num_far


def _closed_up(stays: Tensor) -> Tensor:
    """Places of the rows that stay, `[num_lists, most]` int64, -1 behind the last one of a list."""
    counts = stays.sum(dim=1)
    most = int(counts.max()) if counts.numel() else 0
    order = torch.argsort(~stays, dim=1, stable=True)[:, :most]
    return order.masked_fill(torch.arange(most) >= counts[:, None], -1)
