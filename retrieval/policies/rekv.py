# SPDX-License-Identifier: Apache-2.0
"""ReKV (arXiv:2503.00540, ICLR 2025): whole frames by their mean key, once per question, closed up before it."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.segmenters.frames import Frames
from kvstore.retrieval.summarisers.mean import Mean
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.trigger import OncePerQuestion
from kvstore.retrieval.view import Pool, View

POLICY = Policy(
    name="rekv",
    source="ReKV, arXiv:2503.00540, as in its code: inner products where the paper has cosines",
    segmenter=Frames(),
    views=(View(Mean(), Dot(), Space.PLAIN, pool=Pool.MEAN, is_shared=True),),
    trigger=OncePerQuestion(),
    position=PositionPolicy.CONSECUTIVE,
)
