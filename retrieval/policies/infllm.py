# SPDX-License-Identifier: Apache-2.0
"""InfLLM (arXiv:2402.04617, NeurIPS 2024): pages by their most looked at keys, all read at one distance."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.summarisers.mean import Received
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.trigger import EveryStep
from kvstore.retrieval.view import Pool, View

POLICY = Policy(
    name="infllm",
    source="InfLLM, arXiv:2402.04617; representatives per KV head where the source has them per query head",
    segmenter=Pages(128),
    views=(View(Received(4), Dot(), Space.FAR, pool=Pool.MEAN, is_shared=True),),
    trigger=EveryStep(),
    position=PositionPolicy.CONSTANT_FAR,
    retrieves_while_appending=True,
    recent_tokens=512,
)
