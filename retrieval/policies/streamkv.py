# SPDX-License-Identifier: Apache-2.0
"""StreamKV (arXiv:2511.07278, AAAI 2026): scenes by the cosine of their mean key, from one budget for all layers."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.scorers.dot import Cosine
from kvstore.retrieval.segmenters.frames import Scenes
from kvstore.retrieval.selectors.layers import AcrossLayers
from kvstore.retrieval.summarisers.mean import Mean
from kvstore.retrieval.summarisers.normalised import Normalised
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.view import Pool, View

POLICY = Policy(
    name="streamkv",
    source="StreamKV, arXiv:2511.07278, whose layers share a budget after a pass over the question, and each reads for "
    "all heads; in ours the KV heads of all layers share it. Its pruning by a guiding prompt is left to a retention",
    segmenter=Scenes(),
    views=(View(Normalised(Mean()), Cosine(), Space.PLAIN, pool=Pool.MEAN),),
    selector=AcrossLayers(),
    position=PositionPolicy.CONSECUTIVE,
)
