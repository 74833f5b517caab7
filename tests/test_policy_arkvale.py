# SPDX-License-Identifier: Apache-2.0
"""The policy `arkvale` against its paper's rule, written out."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.retrieval.memory import LayerMemory
from kvstore.retrieval.registry import policy_named
from tests.layer_tokens import layer_query, layer_tokens, rotate

PAGE = 32


def likely_logit(query: Tensor, page: Tensor) -> float:
    """The largest logit of a key in the box around the page's middle whose sides are the mean distances from it."""
    centre = (page.amax(0) + page.amin(0)) / 2
    spread = sum((key - centre).abs() for key in page) / len(page)
    return float(torch.maximum(query * (centre + spread), query * (centre - spread)).sum())


def test_arkvale_reads_the_pages_with_the_largest_likely_logits() -> None:
    # The last page is cut short at the end.
    tokens, query = layer_tokens(330), layer_query(1)
    memory = LayerMemory(policy_named("arkvale"), 2, 16)
    memory.add(tokens, is_end=True)
    selection = memory.select(query, budget_tokens=128)

    keys = rotate(tokens.keys[None], tokens.positions[:, None])[0]
    asking = rotate(query.query.flatten(0, 1)[None], query.positions[:, None])[0].view(2, 3, 16)
    for head in range(2):
        scores = torch.tensor(
            [sum(likely_logit(each, page) for each in asking[head]) for page in keys[head].split(PAGE)]
        )
        torch.testing.assert_close(selection.scores[head], scores)
        wanted, room = [], 128
        for page in scores.argsort(descending=True).tolist():
            room -= min(PAGE, 330 - PAGE * page)
            if room < 0:
                break
            wanted.append(page)
        assert selection.units[head].tolist() == sorted(wanted)
