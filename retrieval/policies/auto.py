# SPDX-License-Identifier: Apache-2.0
"""Our default: small pages, compared both where they stand and for what they say."""

from kvstore.retrieval.fusion import StandardScores
from kvstore.retrieval.policies.maxsim import POLICY as MAXSIM
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.scorers.bound import Bound
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.summarisers.bounds import CuboidMean
from kvstore.retrieval.summarisers.mean import Mean
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.ahead import Ahead
from kvstore.retrieval.triggers.stride import Stride
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
    fusion=StandardScores(weights=(1.0, 0.75), neighbours=(0.0, 0.5)),
    # Neighbouring tokens ask for much the same; what is chosen for the next one comes while this one is computed.
    trigger=Ahead(Stride(4)),
    full_layers=2,
    recent_tokens=512,
    beyond=MAXSIM,
)
