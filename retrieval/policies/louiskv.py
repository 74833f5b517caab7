# SPDX-License-Identifier: Apache-2.0
"""LouisKV (arXiv:2510.11292, ICLR 2026): clusters of like keys, selected anew where the query turns."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.scorers.dot import Dot
from kvstore.retrieval.segmenters.clusters import Clusters
from kvstore.retrieval.summarisers.mean import Mean
from kvstore.retrieval.tokens import Space
from kvstore.retrieval.triggers.query_cosine import QueryCosine
from kvstore.retrieval.view import Group, View

POLICY = Policy(
    name="louiskv",
    source="LouisKV, arXiv:2510.11292; generated tokens are clustered, too, where the source cuts them to runs",
    segmenter=Clusters(16),
    views=(View(Mean(), Dot(), Space.ROTATED, group=Group.SOFTMAX_MEAN),),
    # The source has .85 for long inputs with short answers, .7 for long answers.
    trigger=QueryCosine(0.85),
    full_layers=2,
    recent_tokens=512,
)
