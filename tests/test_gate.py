# SPDX-License-Identifier: Apache-2.0
"""The gate of the catalogue, and of fetches: an interrupt anywhere in it shuts nobody out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from kvstore.store import FetchRequest
from kvstore.tiers.catalogue import Catalogue
from kvstore.tiers.gate import Gate
from tests.interrupting import interrupt_at
from tests.store_blocks import block_key, empty_slot, make_slot, open_store

HANG_S = 60.0


def _interrupt_at(number: int, call: Callable[[], object], names: tuple[str, ...]) -> bool:
    return interrupt_at(number, call, lambda code: code.co_filename.endswith(names))


def _in_time(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(HANG_S)
    assert not thread.is_alive()


def test_an_interrupted_transaction_keeps_nobody_from_the_catalogue(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, writable=True, durable=False)

    def read() -> None:
        with catalogue.read():
            pass

    for work in (read, lambda: catalogue.write(lambda view: None), lambda: catalogue._resize(1 << 25)):
        number = 1
        while _interrupt_at(number, work, ("threading.py", "gate.py", "catalogue.py", "contextlib.py")):
            _in_time(lambda: catalogue._resize(1 << 25))
            _in_time(read)
            number += 1
        assert number > 3
    catalogue.close()


def test_one_alone_waits_for_all_inside_and_leaving_twice_is_leaving_once() -> None:
    gate, entered = Gate(), threading.Event()
    first, second = object(), object()
    gate.enter(first)
    gate.enter(second)

    def alone() -> None:
        with gate.exclusive():
            entered.set()

    thread = threading.Thread(target=alone, daemon=True)
    thread.start()
    gate.leave(first)
    gate.leave(first)
    assert not entered.wait(0.05), "the second is inside"
    gate.leave(second)
    assert entered.wait(HANG_S)
    thread.join(HANG_S)


def test_a_store_reads_on_and_closes_after_an_interrupted_fetch(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put([block_key(1)], [make_slot(1)], [40])
    request = FetchRequest(block_key(1), empty_slot())
    fetcher = store._moving().fetcher
    number = 1
    while _interrupt_at(number, lambda: fetcher.fetch([request]), ("threading.py", "fetcher.py", "flights.py")):
        assert not fetcher._demands
        store._moving().host.forget(block_key(1))
        _in_time(lambda: fetcher.fetch([request]))
        store._moving().host.forget(block_key(1))
        number += 1
    assert number > 3
    _in_time(store.close)
