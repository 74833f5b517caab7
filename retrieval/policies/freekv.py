# SPDX-License-Identifier: Apache-2.0
"""FreeKV (arXiv:2505.13109, ICLR 2026): Quest's bounds over larger pages, agreed on by the heads of a group."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.scorers.bound import Bound
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.summarisers.bounds import MinMax
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.query_cosine import QueryCosine
from kvstore.retrieval.triggers.speculative import Speculative
from kvstore.retrieval.view import Group, View

POLICY = Policy(
    name="freekv",
    source="FreeKV, arXiv:2505.13109; the first two layers in full, as in Quest",
    segmenter=Pages(32),
    views=(View(MinMax(), Bound(), Space.ROTATED, group=Group.SOFTMAX_MEAN),),
    trigger=Speculative(QueryCosine(0.8)),
    full_layers=2,
    recent_tokens=512,
)
