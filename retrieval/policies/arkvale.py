# SPDX-License-Identifier: Apache-2.0
"""ArkVale (NeurIPS 2024): pages by a logit that a key in the middle of their box could have."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.scorers.bound import Bound
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.summarisers.bounds import CuboidMean
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.trigger import EveryStep
from kvstore.retrieval.view import View

POLICY = Policy(
    name="arkvale",
    source="ArkVale, NeurIPS 2024; one list per KV head, where the source's default is one per layer",
    segmenter=Pages(32),
    views=(View(CuboidMean(), Bound(), Space.ROTATED),),
    trigger=EveryStep(),
    full_layers=2,
    recent_tokens=64,
)
