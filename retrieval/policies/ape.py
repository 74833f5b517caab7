# SPDX-License-Identifier: Apache-2.0
"""APE (arXiv:2502.05431, ICLR 2025): contexts that were read apart, attended side by side behind a shared prefix."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.summarisers.mean import Mean
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.view import Pool, View

POLICY = Policy(
    name="ape",
    source="APE, arXiv:2502.05431, which attends to all its contexts; ours to those that fit the budget, by mean key. "
    "Pages that follow each other are one context. Temperature and scale are chosen per model there",
    segmenter=Pages(128),
    views=(View(Mean(), Dot(), Space.PLAIN, pool=Pool.MEAN, is_shared=True),),
    position=PositionPolicy.PARALLEL,
    context_temperature=0.9,
    context_scale=0.9,
)
