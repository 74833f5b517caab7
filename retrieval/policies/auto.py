# SPDX-License-Identifier: Apache-2.0
"""Our default: pages by the keys that were looked at, compared both where they stand and for what they say."""

from kvstore.retrieval.fusion import StandardScores
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.summarisers.attended import Attended
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.trigger import EveryStep
from kvstore.retrieval.view import View

POLICY = Policy(
    name="auto",
    source="ours; docs/retrieval.md has the measurements",
    segmenter=Pages(16),
    views=(
        # What attention will pay: each KV head for itself, at the positions where it reads.
        View(Attended(), Dot(), Space.ROTATED),
        # What answers the question, although few heads look at it: the whole layer, wherever the page stands.
        View(Attended(), Dot(), Space.FAR, is_shared=True),
    ),
    fusion=StandardScores(weights=(1.0, 1.25)),
    trigger=EveryStep(),
    full_layers=2,
)
