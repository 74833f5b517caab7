# SPDX-License-Identifier: Apache-2.0
"""Parts of policies that do not fit each other are refused, with the reason."""

from __future__ import annotations

import dataclasses

import pytest

from kvstore.errors import ConfigError
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import layer_query, layer_tokens

MOVED = [each for each in PositionPolicy if each is not PositionPolicy.ORIGINAL]


@pytest.mark.parametrize("name", ["arkvale", "freekv", "louiskv", "quest", "retroinfer", "shadowkv"])
@pytest.mark.parametrize("position", MOVED)
def test_scores_of_rotated_keys_do_not_fit_keys_that_move(name: str, position: PositionPolicy) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: it scores keys at their original positions.*{position}"):
        dataclasses.replace(policy_named(name), position=position)


@pytest.mark.parametrize("name", ["infllm", "rekv"])
@pytest.mark.parametrize("position", PositionPolicy)
def test_scores_of_keys_before_rope_fit_any_position(name: str, position: PositionPolicy) -> None:
    assert dataclasses.replace(policy_named(name), position=position).position is position


@pytest.mark.parametrize("position", MOVED)
def test_estimates_do_not_fit_keys_that_move(position: PositionPolicy) -> None:
    with pytest.raises(ConfigError, match=rf"estimated at original positions, not {position}"):
        dataclasses.replace(policy_named("rekv"), position=position, estimated_share=0.2)


@pytest.mark.parametrize("name", ["infllm", "rekv"])
def test_keys_that_are_stored_rotated_cannot_be_compared_before_rope(name: str) -> None:
    memory = LayerMemory(policy_named(name), 2, 16)
    with pytest.raises(ConfigError, match="stored rotated"):
        memory.add(dataclasses.replace(layer_tokens(200), rotate=None), is_end=True)
    memory.add(layer_tokens(200), is_end=True)
    with pytest.raises(ConfigError, match="queries come rotated"):
        memory.select(dataclasses.replace(layer_query(1), rotate=None), 100)
