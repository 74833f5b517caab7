# SPDX-License-Identifier: Apache-2.0
"""RetroInfer (arXiv:2505.02922): the best clusters are read, and the attention to the next best is estimated."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.segmenters.clusters import Clusters
from kvstore.retrieval.summarisers.mean import Mean
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.trigger import EveryStep
from kvstore.retrieval.view import Group, View

POLICY = Policy(
    name="retroinfer",
    source="RetroInfer, arXiv:2505.02922; the budget, and not 1.8 % of the clusters, says how many are read",
    segmenter=Clusters(16),
    # A mean over the heads of a group puts clusters in the same order as the source's sum.
    views=(View(Mean(), Dot(), Space.ROTATED, group=Group.SOFTMAX_MEAN),),
    trigger=EveryStep(),
    estimated_share=0.232,
    recent_tokens=64,
)
