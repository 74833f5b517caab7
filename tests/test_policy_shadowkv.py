# SPDX-License-Identifier: Apache-2.0
"""The policy `shadowkv` against its paper's rule, written out."""

from __future__ import annotations

import pytest
import torch

from kvstore.errors import ConfigError
from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.reserve import Reserve
from tests.layer_tokens import layer_query, layer_tokens, rotate

PAGE = 8


def test_shadowkv_reads_outlier_pages_and_those_with_the_best_mean_keys() -> None:
    # A budget of 152 pages: 24 outliers beside 128 by their mean keys.
    tokens, query = layer_tokens(PAGE * 400), layer_query(3)
    memory = LayerMemory(policy_named("shadowkv"), 2, 16)
    memory.add(tokens)
    selection = memory.select(query, budget_tokens=PAGE * 152)

    keys = rotate(tokens.keys[None], tokens.positions[:, None])[0]
    asking = rotate(query.query[:, :, -1:].flatten(0, 1)[None], query.positions[:, None, -1:])[0].view(2, 3, 16)
    for head in range(2):
        pages = keys[head].split(PAGE)
        likeness = [min(float(torch.cosine_similarity(key, page.mean(0), dim=0)) for key in page) for page in pages]
        landmarks = torch.stack([page.mean(0) for page in pages])
        shares = torch.stack([(each @ landmarks.T / 4).softmax(0) for each in asking[head]]).amax(0)
        outliers = sorted(range(400), key=lambda page: likeness[page])
        best = shares.argsort(descending=True).tolist()
        # Pages that are wanted twice leave room for more of both, in the same proportion.
        wanted: set[int] = set()
        ahead = sorted(
            [((rank + 1) / 24, page) for rank, page in enumerate(outliers)]
            + [((rank + 1) / 128, page) for rank, page in enumerate(best)]
        )
        for _, page in ahead:
            if len(wanted) < 152:
                wanted.add(page)
        assert selection.units[head].tolist() == sorted(wanted)
        assert set(outliers[:24]) | set(best[:128]) <= wanted


def test_a_reserve_leaves_the_first_view_its_share() -> None:
    asked, reserved = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2]]), torch.tensor([[0.0, 0, 0, 0, 0, 0, 1, 2]])
    order = Reserve(0.25).fuse([asked, reserved]).argsort(descending=True, stable=True)
    # Of the first four one is reserved, the last unit; of eight, two.
    assert set(order[0, :4].tolist()) == {0, 1, 2, 7}
    assert set(order[0, :6].tolist()) >= {0, 1, 2, 3, 7}


def test_a_reserve_takes_nothing_that_may_not_be_chosen() -> None:
    asked = torch.tensor([[1.0, float("-inf")]])
    assert Reserve(0.5).fuse([asked, torch.tensor([[0.0, 1.0]])])[0].isneginf().tolist() == [False, True]


@pytest.mark.parametrize("share", [-0.1, 0.0, 1.0])
def test_a_reserve_of_nothing_or_all_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="reserve"):
        Reserve(share)
