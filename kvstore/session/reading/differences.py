# SPDX-License-Identifier: Apache-2.0
"""What selections read and those before them did not, in one layer or in many at once: most of it is the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.session.reading.past import PastReader, Reading
from kvstore.session.residency import LoadReport, Residency
from kvstore.store import Entry


@dataclass(frozen=True, slots=True)
class Differences:
    """Rows of the pasts of some layers that are to hold other tokens; those of a layer follow each other.

    Args:
        layers: which.
        counts: rows of each.
        numbers: by layer, `[num_lists, num_rows]` int64: the token of each row of the past afterwards.
        heads: [num_replaced] int64: KV head of each.
        rows: [num_replaced] int64: its row.
        positions: [position rows, num_replaced] int64.
        keys: [num_replaced, key_dim].
        values: [num_replaced, value_dim].
        blocks: by layer, indices of the blocks that the new tokens are in.
    """

    layers: list[int]
    counts: list[int]
    numbers: list[Tensor]
    heads: Tensor
    rows: Tensor
    positions: Tensor
    keys: Tensor
    values: Tensor
    blocks: list[frozenset[int]]


@dataclass(frozen=True, slots=True)
class _Changes:
    """Which tokens come: of which layer (by place), for which list, to which row, out of which block; all `[num]`."""

    layers: list[int]
    numbers: Tensor
    place: Tensor
    lists: Tensor
    rows: Tensor
    tokens: Tensor
    block: Tensor

    def of(self, places: Sequence[int]) -> _Changes:
        """Those of some layers."""
        kept = torch.zeros(len(self.layers), dtype=torch.bool)
        kept[list(places)] = True
        which = kept[self.place]
        return _Changes(
            [self.layers[place] for place in places],
            self.numbers[kept],
            (kept.cumsum(0) - 1)[self.place[which]],
            self.lists[which],
            self.rows[which],
            self.tokens[which],
            self.block[which],
        )


class DifferenceReader:
    """Finds what is to be replaced and reads no more than that (FreeKV, arXiv:2505.13109; LServe, arXiv:2502.14866).

    Args:
        residency: where blocks come to the device.
        reader: reads those that are not there yet.
    """

    def __init__(self, residency: Residency, reader: PastReader) -> None:
        self._residency = residency
        self._reader = reader

    def read(
        self,
        readings: Mapping[int, Reading],
        held: Mapping[int, Tensor],
        entries: Sequence[Entry],
        firsts: Tensor,
        positions: Callable[[Entry], Tensor],
        report: LoadReport,
        timeout_s: float | None = None,
    ) -> Differences | None:
        """Bring what layers read anew.

        One layer's blocks are loaded. Of several layers, those that would have to load any are left out: they can wait
        until their turn comes, and the blocks come meanwhile.

        Args:
            readings: the new selections, by layer; all have the same near part as those before them.
            held: by layer, `[num_lists, num_rows]` int64: token of each row that it attends to, the far ones first.
            entries: the stream's entries, from the first one on.
            firsts: [num_entries] int64: number of the first token of each.
            positions: [position rows, num_tokens] int64 of a block; raises `CorruptRecordError`.
            report: is added to.
            timeout_s: see `Residency.load`.

        Returns:
            None where no layer can be had so: lists have other lengths, or a block is missing.
        """
        changes = self._changes(readings, held, firsts)
        if changes is None:
            return None
        used = torch.zeros(len(changes.layers), max(len(entries), 1), dtype=torch.bool)
        used[changes.place, changes.block] = True
        blocks = [row.nonzero()[:, 0].tolist() for row in used]
        if len(readings) == 1:
            return self._load(changes, blocks, entries, firsts, positions, report, timeout_s)
        keys = [[entries[block].key for block in each] for each in blocks]
        there = [
            place
            for place, (layer, each) in enumerate(zip(changes.layers, keys, strict=True))
            if not self._residency.missing(each, layer)
        ]
        if len(there) < len(changes.layers):
            changes, blocks, keys = changes.of(there), [blocks[place] for place in there], [keys[p] for p in there]
        named = sorted({block for each in blocks for block in each})
        table = self._reader.positions_of_blocks([entries[block] for block in named], positions, report)
        if not changes.layers or not bool(table.is_had.all()):
            return None
        report.add(self._residency.use(keys))
        where = torch.zeros(max(len(entries), 1), dtype=torch.int64)
        where[named] = torch.arange(len(named))
        slots = torch.tensor([self._residency.slot_of(entries[block].key) for block in named], dtype=torch.int64)
        row, place = changes.tokens - firsts[changes.block], where[changes.block]
        at = table.at(place, row, changes.tokens)
        pool = self._residency.pool
        layer = torch.tensor(changes.layers)[changes.place]
        of_all = changes.numbers.shape[1] == 1
        heads = slice(None) if of_all else changes.lists.to(pool.device)
        index = (slots[place].to(pool.device), layer.to(pool.device), heads, row.to(pool.device))
        keys_of, values_of = (plane[index] for plane in pool.planes)
        return _differences(changes, keys_of, values_of, at, [frozenset(each) for each in blocks])

    def _changes(self, readings: Mapping[int, Reading], held: Mapping[int, Tensor], firsts: Tensor) -> _Changes | None:
        layers: list[int] = []
        for layer, reading in readings.items():
            num_far = reading.far[0].shape[0]
            is_like = held[layer].shape == (len(reading.far), num_far + reading.near.shape[0])
            is_like &= not layers or held[layer].shape == held[layers[0]].shape
            if is_like and all(each.shape[0] == num_far for each in reading.far) and bool((held[layer] >= 0).all()):
                layers.append(layer)
        if not layers:
            return None
        numbers = torch.stack([held[layer] for layer in layers])
        lists = [far for layer in layers for far in readings[layer].far]
        wanted = torch.stack(lists).unflatten(0, (len(layers), -1))
        had = numbers[:, :, : wanted.shape[2]]
        leaves, comes = ~_are_among(had, wanted), ~_are_among(wanted, had.sort(dim=2).values)
        tokens = wanted[comes]  # as many of each list as leave it, in the same order of layers and lists
        had[leaves] = tokens
        place, which, rows = leaves.nonzero(as_tuple=True)
        block = torch.searchsorted(firsts, tokens, right=True) - 1
        return _Changes(layers, numbers, place, which, rows, tokens, block)

    def _load(
        self,
        changes: _Changes,
        blocks: list[list[int]],
        entries: Sequence[Entry],
        firsts: Tensor,
        positions: Callable[[Entry], Tensor],
        report: LoadReport,
        timeout_s: float | None,
    ) -> Differences | None:
        layer, tokens = changes.layers[0], changes.tokens
        few = Reading((tokens,), tokens[:0])
        past = self._reader.read(few, entries, firsts, positions, range(layer, layer + 1), report, timeout_s)
        if past.numbers.shape[1] != tokens.shape[0]:
            return None
        keys, values = past.keys[layer].transpose(0, 1), past.values[layer].transpose(0, 1)
        if changes.numbers.shape[1] > 1:
            each = torch.arange(tokens.shape[0])
            keys, values = keys[each, changes.lists], values[each, changes.lists]
        return _differences(changes, keys, values, past.positions[:, 0], [frozenset(blocks[0])])


def _differences(
    changes: _Changes, keys: Tensor, values: Tensor, at: Tensor, blocks: list[frozenset[int]]
) -> Differences:
    """Of rows `[num, dim]`, or `[num, kv_heads, dim]` where one list is that of all KV heads."""
    heads, rows = changes.lists, changes.rows
    counts = torch.bincount(changes.place, minlength=len(changes.layers))
    if keys.dim() == 3:
        kv_heads = keys.shape[1]
        heads = torch.arange(kv_heads).repeat(rows.shape[0])
        rows, at, counts = rows.repeat_interleave(kv_heads), at.repeat_interleave(kv_heads, dim=1), counts * kv_heads
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    return Differences(changes.layers, counts.tolist(), list(changes.numbers), heads, rows, at, keys, values, blocks)


def _are_among(numbers: Tensor, ascending: Tensor) -> Tensor:
    """Whether numbers are in the list of their own row, `[..., num]` bool."""
    if ascending.shape[-1] == 0:
        return torch.zeros_like(numbers, dtype=torch.bool)
    place = torch.searchsorted(ascending, numbers.contiguous()).clamp_max(ascending.shape[-1] - 1)
    return ascending.gather(-1, place) == numbers
