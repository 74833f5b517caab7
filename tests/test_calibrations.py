# SPDX-License-Identifier: Apache-2.0
"""The calibrations of a store in several threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from kvstore.config import Access, Durability, StoreConfig
from kvstore.decision import Decision
from kvstore.spec import ModelSpec
from kvstore.tiers.calibrations import Calibrations
from kvstore.tiers.catalogue import WriteView
from kvstore.tiers.disk import DiskTier
from tests.codec_slots import fitted

SPEC = ModelSpec(1, 1, 8, 8, "bfloat16", "pre", "test", "{}", "0")


def test_what_holds_in_memory_is_what_was_committed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = DiskTier(tmp_path, StoreConfig(Access.WRITE, Durability.NONE, host_nbytes=0))
    write, has_committed = disk.catalogue.write, Event()

    def slowly(work: Callable[[WriteView], bool]) -> bool:
        """The first commit is known to nobody for a moment."""
        done = write(work)
        if not has_committed.is_set():
            has_committed.set()
            time.sleep(0.2)
        return done

    monkeypatch.setattr(disk.catalogue, "write", slowly)
    calibrations = Calibrations(disk.catalogue)
    calibration = fitted([(torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8))])
    first, second = (Decision(calibration.id, 8, source) for source in ("first", "second"))
    writer = Thread(target=calibrations.keep, args=(SPEC, calibration, first), kwargs={"replace": False})
    writer.start()
    assert has_committed.wait(10)
    calibrations.keep(SPEC, calibration, second)
    writer.join()
    assert calibrations.of_model(SPEC) == second
    assert Calibrations(disk.catalogue).of_model(SPEC) == second
    disk.close()
