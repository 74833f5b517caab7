# SPDX-License-Identifier: Apache-2.0
"""The device pool: slots, their views, and misuse."""

from __future__ import annotations

import pytest
import torch

from kvstore.errors import CapacityError, ConfigError
from kvstore.layout import BlockLayout
from kvstore.spec import ModelSpec
from kvstore.tiers.device.pool import DevicePool

SPEC = ModelSpec(
    num_layers=2,
    kv_heads=3,
    key_dim=8,
    value_dim=4,
    dtype="float16",
    key_space="pre",
    architecture="test",
    rope="{}",
    revision="0",
)
LAYOUT = BlockLayout(SPEC, block_tokens=5)
DEVICES = [
    pytest.param(torch.device("cpu"), id="cpu"),
    pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def pool(request: pytest.FixtureRequest) -> DevicePool:
    device: torch.device = request.param
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return DevicePool(LAYOUT, 3, device)


def test_every_slot_is_handed_out_once_then_none(pool: DevicePool) -> None:
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, None]
    pool.free(1)
    assert [pool.allocate(), pool.allocate()] == [1, None]


@pytest.mark.parametrize("slot_idx", [-1, 0, 3])
def test_freeing_a_slot_that_is_not_taken_is_refused(pool: DevicePool, slot_idx: int) -> None:
    with pytest.raises(ConfigError):
        pool.free(slot_idx)


def test_views_share_the_slots_memory_and_touch_no_other_slot(pool: DevicePool) -> None:
    for slot_idx in range(pool.num_slots):
        pool.slot(slot_idx).fill_(7)
    pool.keys(1).fill_(1.0)
    pool.values(1).fill_(2.0)
    assert pool.keys(1).shape == (2, 3, 5, 8)
    assert pool.values(1).shape == (2, 3, 5, 4)
    assert torch.equal(LAYOUT.keys(pool.slot(1)), torch.ones_like(pool.keys(1)))
    assert torch.equal(LAYOUT.values(pool.slot(1)), torch.full_like(pool.values(1), 2.0))
    assert (pool.slot(0) == 7).all()
    assert (pool.slot(2) == 7).all()


def test_a_pool_needs_a_slot() -> None:
    with pytest.raises(ConfigError):
        DevicePool(LAYOUT, 0, torch.device("cpu"))


def test_a_pool_larger_than_memory_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match="no room"):
        DevicePool(LAYOUT, 1 << 46, torch.device("cpu"))
