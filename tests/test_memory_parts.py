# SPDX-License-Identifier: Apache-2.0
"""Units as bytes: whole they are what they were, and other bytes are refused by name."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import KVStoreError
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.memory_parts import load_units, pack_units
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.segmenters.clusters import Clusters
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.session.kept_views import make_index
from tests.layer_tokens import layer_query, layer_tokens

RULES = {
    "pages": replace(policy_named("quest"), segmenter=Pages(1)),
    "clusters": replace(policy_named("retroinfer"), segmenter=Clusters(2, 64)),
}
NUM_TOKENS = 2300


def memory_of(name: str, num_tokens: int = NUM_TOKENS) -> LayerMemory:
    """A memory, some of whose tokens are pending."""
    memory = LayerMemory(RULES[name], 2, 16, make_index)
    if num_tokens:
        memory.add(layer_tokens(num_tokens, first=5))
    return memory


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("is_shown", [False, True])
def test_units_in_parts_are_what_they_were(name: str, is_shown: bool) -> None:
    memory, again = memory_of(name), memory_of(name, 0)
    if is_shown:  # what is pending is not kept
        memory.show_pending()
    bounds = [0, 1024, memory.num_units]
    for first, end in pairwise(bounds):
        load_units(again, pack_units(memory, first, end), 5 + NUM_TOKENS)
    memory.hide_pending()
    assert again.num_units == memory.num_units > 1100
    assert again.next_token == 5 + memory.num_tokens == 5 + again.num_tokens
    query = layer_query(2)
    one, other = memory.select(query, 50), again.select(query, 50)
    assert torch.equal(one.scores, other.scores)
    for part, wanted in zip((*other.tokens, *other.estimated), (*one.tokens, *one.estimated), strict=True):
        assert torch.equal(part, wanted)
    if one.estimate is not None and other.estimate is not None:
        assert torch.equal(one.estimate.value_sums, other.estimate.value_sums)


def test_what_does_not_follow_is_refused() -> None:
    memory = memory_of("pages")
    first, second = pack_units(memory, 0, 1024), pack_units(memory, 1024, 2300)
    for before, part, end in (([], second, 2305), ([first], first, 2305), ([], first, 1028), ([first], second, 2304)):
        again = memory_of("pages", 0)
        for had in before:
            load_units(again, had, 2305)
        with pytest.raises(KVStoreError, match="do not follow"):
            load_units(again, part, end)
    with pytest.raises(KVStoreError, match="not of this policy"):
        load_units(memory_of("clusters", 0), first, 2305)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_other_bytes_are_refused_or_harmless(name: str, data: st.DataObject) -> None:
    whole = PACKED[name]
    place = data.draw(st.integers(0, 300) | st.integers(0, len(whole) - 1))
    changed = data.draw(st.sampled_from((0, 1, 127, 128, 255)))
    bad = whole[:place] + bytes([changed]) + whole[place + 1 :]
    if data.draw(st.booleans()):
        bad = whole[:place]
    again = memory_of(name, 0)
    try:
        load_units(again, bad, 5 + NUM_TOKENS)
    except KVStoreError:
        return
    chosen = again.select(layer_query(1), 20)
    assert all(bool(((tokens >= 0) & (tokens < 5 + NUM_TOKENS)).all()) for tokens in chosen.tokens)


PACKED = {name: pack_units(memory_of(name, 300), 0, memory_of(name, 300).num_units) for name in RULES}
