# SPDX-License-Identifier: Apache-2.0
"""ShadowKV (arXiv:2410.21465): small pages by their mean key, and those whose mean says little in any case."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.reserve import Reserve
from kvstore.retrieval.scorers.dot import Constant, Dot
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.summarisers.mean import Mean
from kvstore.retrieval.summarisers.sphere import Outlier
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.trigger import EveryStep
from kvstore.retrieval.view import Group, View

POLICY = Policy(
    name="shadowkv",
    source="ShadowKV, arXiv:2410.21465, its selection; outlier pages take a part of the budget instead of adding to it",
    segmenter=Pages(8),
    views=(
        View(Mean(), Dot(), Space.ROTATED, group=Group.SOFTMAX_MAX),
        View(Outlier(), Constant(), Space.ROTATED),
    ),
    # 24 of them for every 128 pages of the budget.
    fusion=Reserve(24 / (24 + 128)),
    trigger=EveryStep(),
    recent_tokens=32,
)
