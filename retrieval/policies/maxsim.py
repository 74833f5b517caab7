# SPDX-License-Identifier: Apache-2.0
"""Late interaction between the keys of question and block; docs/retrieval.md."""

from kvstore.retrieval.maxsim import LateInteraction
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy

POLICY = Policy(
    name="maxsim",
    source="late interaction (ColBERT, arXiv:2004.12832) between the keys of question and block; docs/retrieval.md",
    late=LateInteraction(),
    position=PositionPolicy.CONSECUTIVE,
)
