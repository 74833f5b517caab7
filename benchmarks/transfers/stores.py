# SPDX-License-Identifier: Apache-2.0
"""Whole stores: batches of blocks fetched and put through `Store`, beside rivals and beside the device alone."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import count as count_up
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harness import Report, check
from kvstore.codec import Profile
from kvstore.layout import BlockLayout
from kvstore.native import Arena, DirectFile, IoPool
from kvstore.spec import BlockKey, ModelSpec, chain_key
from kvstore.store import Access, Durability, FetchRequest, Outcome, Store
from transfers.raw import Data, RawFile
from transfers.rivals import BlockFiles, LmdbValues, MappedFile, Rival, SafetensorsFiles
from transfers.rounds import Call, rounds

_BATCH = 32
_IN_FLIGHT = 4
"""Batches of the row that puts several at once."""
_TOKENS = 16
_LAYERS = 2


def layout_of(nbytes: int) -> BlockLayout:
    """A layout whose slots have `nbytes`, a power of two from 4 KiB on."""
    dim = nbytes // (_TOKENS * _LAYERS * 2 * 2)
    heads = max(1, dim // 128)
    spec = ModelSpec(_LAYERS, heads, dim // heads, dim // heads, "bfloat16", "pre", "bench", "{}", "0")
    return BlockLayout(spec, _TOKENS)


class Stores:
    """Blocks of one size in a store of profile `raw` and in its rivals."""

    def __init__(self, report: Report, library: ctypes.CDLL, folder: Path, size: int, place: str, least: int) -> None:
        self._report = report
        self._size = size
        self._least = least
        self._layout = layout_of(size)
        self._count = min(2048, (192 << 20) // size)
        self._case: dict[str, Any] = {"size": size, "place": place}
        self._chance = np.random.default_rng(size)
        self._folder = folder
        self._cleanup = ExitStack()
        self._blocks = self._chance.integers(0, 256, (self._count, size), dtype=np.uint8)
        self._keys = [self._key(number) for number in range(self._count)]
        self._into = np.ones((_BATCH, size), dtype=np.uint8)
        self._fresh = count_up(self._count)
        self._library = library
        self._raw_path = folder / "raw"
        self._raw_path.write_bytes(self._blocks.tobytes())
        self._put_amount = min(_BATCH, max(4, (8 << 20) // size))
        most = max(_BATCH, _IN_FLIGHT * self._put_amount)
        self._raw = RawFile(library, self._raw_path, most * size)
        self._cleanup.callback(self._raw.close)
        self._pool = IoPool(4)
        self._file = DirectFile(self._raw_path, True)
        self._arena = Arena(most * size, False)
        self._memory: Data = np.frombuffer(memoryview(self._arena), dtype=np.uint8)
        self._memory[:] = 1
        for resource in (self._file, self._pool):
            self._cleanup.callback(resource.close)
        self._rivals = self._make_rivals()
        for rival in self._rivals.values():
            self._cleanup.callback(rival.close)

    def run(self) -> None:
        """Measure writes, then cold reads, then warm ones."""
        for start in range(0, self._count, _BATCH):
            numbers = range(start, min(start + _BATCH, self._count))
            for rival in self._rivals.values():
                rival.write(numbers, [self._blocks[number] for number in numbers])
        with self._open(Access.WRITE, 4) as store:
            for num_batches in (1, _IN_FLIGHT):
                self._writes(store, num_batches)
            self._put(store, range(self._count))
        with self._open(Access.READ, 2) as store:
            self._cold_reads(store)
        with self._open(Access.READ, 2 * _BATCH) as store:
            self._warm_reads(store)

    def close(self) -> None:
        """Close everything; the folder is the caller's."""
        self._cleanup.close()

    def _make_rivals(self) -> dict[str, Rival]:
        return {
            "LMDB values": LmdbValues(self._folder / "lmdb", 3 * self._count * (self._size + 8192) + (64 << 20)),
            "one file per block": BlockFiles(self._folder / "files"),
            "safetensors": SafetensorsFiles(self._folder / "safetensors"),
            "mmap": MappedFile(self._folder / "mapped", self._size, self._count),
        }

    def _open(self, access: Access, host_slots: int) -> Store:
        return Store.open(
            self._folder / "store",
            access=access,
            layout=self._layout,
            profile=Profile.RAW,
            host_nbytes=host_slots * self._layout.slot_nbytes,
            durability=Durability.COMMIT,
        )

    def _key(self, number: int) -> BlockKey:
        return chain_key(None, number.to_bytes(8, "little"), "bench io")

    def _slot(self, block: Data) -> Tensor:
        return torch.from_numpy(block)

    def _put(self, store: Store, numbers: range) -> None:
        for start in range(numbers.start, numbers.stop, _BATCH):
            chosen = range(start, min(start + _BATCH, numbers.stop))
            slots = [self._slot(self._blocks[number % self._count]) for number in chosen]
            stored = store.put([self._key(number) for number in chosen], slots, [_TOKENS] * len(chosen))
            check(set(stored) == {Outcome.STORED}, f"a put ended as {set(stored)}")

    def _writes(self, store: Store, num_batches: int) -> None:
        """Batches until they are durable, over blocks that are there: space is used again everywhere.

        Several are submitted before the first is waited for; who has no queue writes as many blocks, and syncs once.
        """
        amount = num_batches * self._put_amount
        batches = self._batches(amount)
        last: list[BlockKey] = []

        def forget() -> None:
            if last:
                store.remove(last)
                last.clear()

        def put() -> None:
            tickets = []
            for _ in range(num_batches):
                first = next(self._fresh) * _BATCH
                chosen = range(first, first + self._put_amount)
                keys = [self._key(number) for number in chosen]
                last.extend(keys)
                slots = [self._slot(self._blocks[number % self._count]) for number in chosen]
                tickets.append(store.submit_put(keys, slots, [_TOKENS] * len(keys)))
            stored = {outcome for ticket in tickets for outcome in ticket.outcomes()}
            check(stored == {Outcome.STORED}, f"a put ended as {stored}")

        def write_raw(*, is_uring: bool) -> None:
            places = next(batches).astype(np.uint64) * np.uint64(self._size)
            self._raw.move(places, self._size, amount, is_write=True, is_uring=is_uring)
            self._raw.sync()

        def write_pool() -> None:
            places = (next(batches) * self._size).tolist()
            self._pool.write(self._file, self._arena, [(at, n * self._size, self._size) for n, at in enumerate(places)])
            self._file.sync()

        def write_rival(rival: Rival) -> None:
            numbers = next(batches).tolist()
            rival.write(numbers, [self._blocks[number] for number in numbers])

        calls = {"Store.put": Call(put, forget), "IoPool": Call(write_pool)}
        calls |= self._limits(write_raw)
        calls |= {name: Call(lambda rival=rival: write_rival(rival)) for name, rival in self._rivals.items()}  # type: ignore[misc]
        case = {"way": "host->disk", "depth": amount, "cold": "synced"}
        self._compare("put" if num_batches == 1 else "puts in flight", calls, amount, case)
        forget()
        self._raw_path.write_bytes(self._blocks.tobytes())

    def _cold_reads(self, store: Store) -> None:
        batches = self._batches(_BATCH)
        chosen: list[int] = []

        def choose() -> None:
            chosen[:] = next(batches).tolist()

        def choose_and_forget(rival: Rival) -> None:
            choose()
            rival.forget(chosen)

        def fetch() -> None:
            requests = [FetchRequest(self._keys[n], self._slot(at)) for n, at in zip(chosen, self._into, strict=True)]
            outcomes = store.fetch(requests).outcomes
            check(set(outcomes) <= {Outcome.DISK, Outcome.HOST}, f"a fetch ended with {outcomes}")

        def read_raw(*, is_uring: bool) -> None:
            places = np.array(chosen, dtype=np.uint64) * np.uint64(self._size)
            self._raw.move(places, self._size, _BATCH, is_uring=is_uring)

        def read_pool() -> None:
            ops = [(number * self._size, at * self._size, self._size) for at, number in enumerate(chosen)]
            self._pool.read(self._file, self._arena, ops)

        calls = {"Store.fetch": Call(fetch, choose), "IoPool": Call(read_pool, choose)}
        calls |= self._limits(read_raw, choose)
        for name, rival in self._rivals.items():
            calls[name] = Call(
                lambda rival=rival: rival.read(chosen, list(self._into)),  # type: ignore[misc]
                lambda rival=rival: choose_and_forget(rival),  # type: ignore[misc]
            )
        for name, call in calls.items():
            call.prepare()
            self._into[:] = 0
            call.run()
            memory = {"O": self._raw.memory, "I": self._memory}.get(name[0], self._into)
            right = memory.ravel()[: _BATCH * self._size].reshape(_BATCH, self._size) == self._blocks[chosen]
            check(bool(right.all()), f"{name} brought other bytes")
        self._compare("fetch", calls, _BATCH, {"way": "disk->host", "depth": _BATCH, "cold": "O_DIRECT, or dropped"})

    def _warm_reads(self, store: Store) -> None:
        """The same batch again: in the host tier, in the page cache."""
        chosen = list(range(_BATCH))
        requests = [FetchRequest(self._keys[n], self._slot(at)) for n, at in zip(chosen, self._into, strict=True)]
        for _ in range(2):
            store.fetch(requests)
        check(set(store.fetch(requests).outcomes) == {Outcome.HOST}, "blocks fetched twice are in memory")
        source = self._blocks[chosen].copy()

        def copy() -> None:
            np.copyto(self._into, source)

        calls = {"Store.fetch": Call(lambda: store.fetch(requests)), "memcpy": Call(copy)}
        for name, rival in self._rivals.items():
            calls[name] = Call(lambda rival=rival: rival.read(chosen, list(self._into)))  # type: ignore[misc]
        self._compare("fetch", calls, _BATCH, {"way": "memory->host", "depth": _BATCH, "cold": "warm"})

    def _limits(self, move: Any, prepare: Any = lambda: None) -> dict[str, Call]:
        calls = {"O_DIRECT, threads": Call(lambda: move(is_uring=False), prepare)}
        if self._raw.has_uring():
            calls["O_DIRECT, io_uring"] = Call(lambda: move(is_uring=True), prepare)
        return calls

    def _batches(self, amount: int) -> Iterator[npt.NDArray[np.int64]]:
        while True:
            order = self._chance.permutation(self._count)
            yield from (order[start : start + amount] for start in range(0, self._count - amount + 1, amount))

    def _compare(self, metric: str, calls: Mapping[str, Call], amount: int, case: dict[str, Any]) -> None:
        timings = rounds(calls, least=self._least, most_s=4.0)
        limits = [name for name in calls if name.startswith("O_DIRECT") or name == "memcpy"]
        limit = min(limits, key=lambda name: timings[name].median_s)
        gigabytes = amount * self._size / 1e9
        for name in calls:
            if name != limit:
                found, against = (name, timings[name]), (limit, timings[limit])
                self._report.rate(metric, gigabytes, "GB/s", found, against, **self._case, **case)
        for ours in calls.keys() & {"Store.fetch", "Store.put", "IoPool"}:
            for rival in self._rivals:
                found, against = (ours, timings[ours]), (rival, timings[rival])
                self._report.rate(metric, gigabytes, "GB/s", found, against, **self._case, **case)
