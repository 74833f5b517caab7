# SPDX-License-Identifier: Apache-2.0
"""Which of a stream's blocks lie in the device pool: loads what is missing, evicts what was used longest ago."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvstore.errors import CapacityError
from kvstore.spec import BlockKey
from kvstore.store import FetchRequest, Store
from kvstore.tiers.device.link import link_to
from kvstore.tiers.device.pool import DevicePool


@dataclass(slots=True)
class LoadReport:
    """What bringing blocks to the device took.

    Args:
        bytes_read: bytes by tier (`device`, `host`, `disk`): uncompressed for device and host, as stored for disk.
        load_s: seconds of waiting for I/O.
        decode_s: seconds of waiting for the codec.
        lost: keys that could not be had, with the reason.
    """

    bytes_read: dict[str, int] = field(default_factory=lambda: {"device": 0, "host": 0, "disk": 0})
    load_s: float = 0.0
    decode_s: float = 0.0
    lost: dict[BlockKey, str] = field(default_factory=dict)

    def add(self, other: LoadReport) -> None:
        """Add another report to this one."""
        for tier, nbytes in other.bytes_read.items():
            self.bytes_read[tier] = self.bytes_read.get(tier, 0) + nbytes
        self.load_s += other.load_s
        self.decode_s += other.decode_s
        self.lost.update(other.lost)


@dataclass(slots=True)
class _Place:
    slot_idx: int
    layers: set[int]
    pins: int = 0


class Residency:
    """The device pool as a cache of blocks, keyed by content.

    A pinned block stays; others leave in order of last use. A block may be present for some layers only. Not
    thread-safe: the engine's thread owns it.

    Args:
        pool: slots on the device.
        store: where missing blocks come from.
        owner: the stream that they are counted to in the host tier.
    """

    def __init__(self, pool: DevicePool, store: Store, owner: str = "") -> None:
        self._pool = pool
        self._link = link_to(pool)
        self._store = store
        self._owner = owner
        self._places: OrderedDict[BlockKey, _Place] = OrderedDict()

    @property
    def pool(self) -> DevicePool:
        """The slots."""
        return self._pool

    @property
    def num_unpinned(self) -> int:
        """Blocks that may be loaded together, beside those that are pinned."""
        return self._pool.num_free + sum(place.pins == 0 for place in self._places.values())

    def missing(self, keys: Sequence[BlockKey], layer: int) -> list[BlockKey]:
        """Those of the blocks that a layer would have to load."""
        return [key for key in keys if (place := self._places.get(key)) is None or layer not in place.layers]

    def slot_of(self, key: BlockKey) -> int:
        """The slot of a block that is loaded."""
        return self._places[key].slot_idx

    def bytes_of(self, slot_idx: int) -> Tensor:
        """Return the bytes of a slot in host memory: [slot_nbytes] uint8 CPU."""
        return self._link.take(slot_idx)

    def take_slot(self) -> int:
        """Take a slot for a block that is being written, evicting if the pool is full.

        Raises:
            CapacityError: every slot is pinned or being written.
        """
        while (slot_idx := self._pool.allocate()) is None:
            victim = next((key for key, place in self._places.items() if place.pins == 0), None)
            if victim is None:
                raise CapacityError(
                    f"the device pool is full: all {self._pool.num_slots} blocks in it are in use; raise device_nbytes"
                )
            self._pool.free(self._places.pop(victim).slot_idx)
        return slot_idx

    def adopt(self, key: BlockKey, slot_idx: int, num_layers: int) -> None:
        """Enter a finished block under its key, pinned once; an equal block that is present already is replaced."""
        old = self._places.pop(key, None)
        if old is not None:
            self._pool.free(old.slot_idx)
        self._places[key] = _Place(slot_idx, set(range(num_layers)), pins=1 + (old.pins if old else 0))

    def use(self, keys: Sequence[Sequence[BlockKey]]) -> LoadReport:
        """Note that blocks that lie here are read where they are, some layers' after those of others.

        Args:
            keys: for each layer.
        """
        counts = Counter(key for each in keys for key in each)
        self._store.note_attention({key: float(count) for key, count in counts.items()})
        for key in counts:
            self._places.move_to_end(key)
        report, layout = LoadReport(), self._pool.layout
        report.bytes_read["device"] += counts.total() * (layout.slot_nbytes // layout.spec.num_layers)
        return report

    def unpin(self, keys: Sequence[BlockKey]) -> None:
        """Undo one `load` (or `adopt`) of each block."""
        for key in keys:
            self._places[key].pins -= 1

    def load(self, keys: Sequence[BlockKey], layers: range, timeout_s: float | None = None) -> LoadReport:
        """Bring blocks to the device and pin them; what cannot be had is reported, not raised.

        Args:
            keys: blocks, without repeats.
            layers: layers wanted.
            timeout_s: seconds to wait for the store; blocks that come later are lost. None waits for all.

        Raises:
            CapacityError: more blocks than the pool has slots; nothing is pinned then.
        """
        report = LoadReport()
        layout = self._pool.layout
        part = layout.slot_nbytes * len(layers) // layout.spec.num_layers
        missing: list[BlockKey] = []
        pinned: list[BlockKey] = []
        self._store.note_attention(dict.fromkeys(keys, 1.0))
        try:
            # Those that are here first, so that making room for the others does not evict them.
            for key in sorted(keys, key=lambda key: key not in self._places):
                if key in self._places:
                    self._places.move_to_end(key)
                else:
                    self._places[key] = _Place(self.take_slot(), set())
                place = self._places[key]
                place.pins += 1
                pinned.append(key)
                if place.layers.issuperset(layers):
                    report.bytes_read["device"] += part
                else:
                    missing.append(key)
            if missing:
                self._fetch(missing, layers, report, timeout_s)
        except BaseException:
            for key in pinned:
                if key not in report.lost:
                    self._drop(key)
            raise
        return report

    def _fetch(self, missing: Sequence[BlockKey], layers: range, report: LoadReport, timeout_s: float | None) -> None:
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        for first in range(0, len(missing), self._link.batch):
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            self._fetch_batch(missing[first : first + self._link.batch], layers, report, left_s)

    def _fetch_batch(
        self, missing: Sequence[BlockKey], layers: range, report: LoadReport, timeout_s: float | None
    ) -> None:
        staged = self._link.stage([self._places[key].slot_idx for key in missing])
        whole = len(layers) == self._pool.layout.spec.num_layers
        began = time.perf_counter()
        fetched = self._store.fetch(
            [
                FetchRequest(key, slot, None if whole else layers, self._owner)
                for key, slot in zip(missing, staged, strict=True)
            ],
            timeout_s,
        )
        elapsed = time.perf_counter() - began
        report.decode_s += min(fetched.decode_s, elapsed)
        report.load_s += max(elapsed - fetched.decode_s, 0.0)
        for tier, nbytes in fetched.bytes_read.items():
            report.bytes_read[str(tier)] = report.bytes_read.get(str(tier), 0) + nbytes
        self._link.send([outcome.is_hit for outcome in fetched.outcomes], layers)
        for item, (key, outcome) in enumerate(zip(missing, fetched.outcomes, strict=True)):
            if outcome.is_hit:
                self._places[key].layers.update(layers)
            else:
                report.lost[key] = fetched.reasons.get(item, str(outcome))
                self._drop(key)

    def _drop(self, key: BlockKey) -> None:
        place = self._places[key]
        place.pins -= 1
        if not place.layers and place.pins == 0:
            self._pool.free(self._places.pop(key).slot_idx)

    def keys(self, key: BlockKey, layer: int, num_tokens: int) -> Tensor:
        """View a block's keys of one layer: [kv_heads, num_tokens, key_dim] on the device."""
        return self._pool.keys(self._places[key].slot_idx)[layer, :, :num_tokens]

    def values(self, key: BlockKey, layer: int, num_tokens: int) -> Tensor:
        """View a block's values of one layer: [kv_heads, num_tokens, value_dim] on the device."""
        return self._pool.values(self._places[key].slot_idx)[layer, :, :num_tokens]
