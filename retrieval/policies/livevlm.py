# SPDX-License-Identifier: Apache-2.0
"""LiveVLM (arXiv:2505.15269, DAC 2026): a thinned memory, most of its pages by plain mean keys, and what is recent."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.retention.received import SinkBuckets
from kvstore.retrieval.retention.thinning import Thinning
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.selectors.counted import TopShare
from kvstore.retrieval.summarisers.mean import Mean
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.view import Group, Pool, View

POLICY = Policy(
    name="livevlm",
    source="LiveVLM, arXiv:2505.15269; keys are compared before RoPE and read at their places, as there. The length of "
    "its short memory, what stays of the long one and the share of its sinks are ours",
    segmenter=Pages(16),
    views=(View(Mean(), Dot(), Space.PLAIN, pool=Pool.MEAN, group=Group.SOFTMAX_MEAN, is_shared=True),),
    selector=TopShare(0.4),
    retention=Thinning(SinkBuckets(), share=0.25, run_tokens=2048),
    recent_tokens=2048,
)
