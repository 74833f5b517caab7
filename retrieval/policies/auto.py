# SPDX-License-Identifier: Apache-2.0
"""Our default: small pages, compared both where they stand and for what they say."""

from kvstore.retrieval.fusion import StandardScores
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.scorers.bound import Bound
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.summarisers.bounds import CuboidMean
from kvstore.retrieval.summarisers.mean import Mean
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.trigger import EveryStep
from kvstore.retrieval.view import View

POLICY = Policy(
    name="auto",
    source="ours; docs/retrieval.md has the measurements",
    segmenter=Pages(8),
    views=(
        # What attention will pay: each KV head for itself, at the positions where it reads.
        View(CuboidMean(), Bound(), Space.ROTATED),
        # What a page says, wherever it stands: the whole layer together, with what stands around it.
        View(Mean(), Dot(), Space.FAR, is_shared=True),
    ),
    fusion=StandardScores(neighbours=(0.0, 0.25)),
    trigger=EveryStep(),
    full_layers=2,
)
