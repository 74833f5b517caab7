# SPDX-License-Identifier: Apache-2.0
"""Quest (arXiv:2406.10774, ICML 2024): pages by the largest logit that a key inside their box could have."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.scorers.bound import Bound
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.summarisers.bounds import MinMax
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.trigger import EveryStep
from kvstore.retrieval.view import View

POLICY = Policy(
    name="quest",
    source="Quest, arXiv:2406.10774; one list per KV head where the source has one per query head",
    segmenter=Pages(16),
    views=(View(MinMax(), Bound(), Space.ROTATED),),
    trigger=EveryStep(),
    full_layers=2,
    recent_tokens=16,
)
