# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and callers' odd slots: nothing that goes wrong while a slot is being moved leaves anybody waiting."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore.layout import BlockLayout
from kvstore.store import Access, Outcome, Store
from kvstore.tiers.moving.host_store import HostStore
from tests.store_blocks import LAYOUT, SPEC, block_key, empty_slot, make_slot, open_store, same_block

LARGE = BlockLayout(replace(SPEC, num_layers=16, kv_heads=8, key_dim=128, value_dim=128), 128)
HANG_S = 60.0


def _get_for_ever(store: Store, slot: Tensor, timeout_s: float | None) -> None:
    while True:
        store.get([block_key(1)], [slot], timeout_s=timeout_s)


@pytest.mark.parametrize("timeout_s", [None, HANG_S])
def test_slots_made_in_inference_mode_are_filled(tmp_path: Path, timeout_s: float | None) -> None:
    with torch.inference_mode():
        slots = [empty_slot() for _ in range(4)]
        source = make_slot(1).clone()
    memory = closing(HostStore(LAYOUT, 4 * LAYOUT.slot_nbytes))
    with open_store(tmp_path, host_slots=10) as disk, memory as host:
        for store, pair in ((disk, slots[:2]), (host, slots[2:])):
            assert store.put([block_key(1)], [source], [40], timeout_s=timeout_s) == [Outcome.STORED]
            for slot in pair:  # from disk, then from memory
                outcomes = store.submit_get([block_key(1)], [slot], timeout_s=timeout_s).wait(HANG_S)
                assert outcomes is not None
                assert outcomes[0].is_hit
                assert same_block(slot, make_slot(1))
            assert store.get([block_key(1)], [pair[0]], timeout_s=timeout_s) == [Outcome.HOST]
            memory_load = disk.load_layers([block_key(1)], [pair[0]])
            assert memory_load.wait(LAYOUT.spec.num_layers - 1, HANG_S) == [Outcome.HOST]


def test_an_interrupted_get_gives_its_slots_back(tmp_path: Path) -> None:
    with Store.open(tmp_path, access=Access.WRITE, layout=LARGE, host_nbytes=4 * LARGE.slot_nbytes) as store:
        slot = torch.zeros(LARGE.slot_nbytes, dtype=torch.uint8)
        assert store.put([block_key(1)], [slot], [128]) == [Outcome.STORED]
        for trial in range(10):
            timeout_s = None if trial % 2 else HANG_S
            alarm = threading.Timer(0.01 + 0.007 * trial, os.kill, (os.getpid(), signal.SIGINT))
            alarm.start()
            with pytest.raises(KeyboardInterrupt):
                _get_for_ever(store, slot, timeout_s)
            alarm.join()
            slot.fill_(7)
            assert (slot == 7).all()
            assert store.get([block_key(1)], [slot], timeout_s=HANG_S)[0].is_hit
            assert not slot.any()
