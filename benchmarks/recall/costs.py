# SPDX-License-Identifier: Apache-2.0
"""What choosing costs: time, bytes that move, and bytes of the index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness import Timing
from kvstore.retrieval.policy import Policy
from recall.capture import Layer
from recall.choosers import Choose
from recall.metrics import FULL_LAYERS, asking

ELEMENT_NBYTES = 2
"""Keys, values and summaries are counted in 16 bits, as engines keep them."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one policy.

    Args:
        layer: seconds to choose in one layer.
        token: seconds to choose in all layers, for one token.
        read_nbytes: keys and values that one token reads in all layers.
        moved_nbytes: those of them that the token before did not read.
    """

    layer: Timing
    token: Timing
    read_nbytes: float
    moved_nbytes: float


def costs(chooses: Sequence[Choose], layers: Sequence[Layer], budget: int) -> Costs:
    """Let every query of a captured text choose, layer by layer."""
    run = layers[0].run
    token_nbytes = ELEMENT_NBYTES * (run.keys.shape[2] + run.values.shape[2])
    seconds: list[list[float]] = []
    read = moved = 0
    previous: list[tuple[torch.Tensor, ...]] = []
    num_queries = layers[0].query.query.shape[2]
    for token in range(num_queries):
        seconds.append([])
        chosen = []
        for choose, layer in list(zip(chooses, layers, strict=True))[FULL_LAYERS:]:
            query = asking(layer, token)
            began = time.perf_counter()
            chosen.append(choose(query, budget))
            seconds[-1].append(time.perf_counter() - began)
        read += sum(tokens.shape[0] for layer in chosen for tokens in layer)
        if previous:
            pairs = [pair for heads in zip(chosen, previous, strict=True) for pair in zip(*heads, strict=True)]
            moved += sum(int((~torch.isin(new, old)).sum()) for new, old in pairs)
        previous = chosen
    return Costs(
        Timing.of([each for token in seconds[1:] for each in token]),
        Timing.of([sum(token) for token in seconds[1:]]),
        token_nbytes * read / num_queries,
        token_nbytes * moved / (num_queries - 1),
    )


def index_share(policy: Policy, layer: Layer) -> float:
    """Bytes of a policy's summaries over those of the keys and values that they stand for."""
    units = policy.segmenter.cut(layer.middle, is_end=True)[0] if policy.segmenter is not None else None
    assert units is not None, "it retrieves"
    key_dim, value_dim = layer.run.keys.shape[2], layer.run.values.shape[2]
    width = sum(view.summariser.width(key_dim) for view in policy.views)
    return width * units.num_units / units.num_tokens / (key_dim + value_dim)
