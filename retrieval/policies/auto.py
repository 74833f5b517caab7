# SPDX-License-Identifier: Apache-2.0
"""Our default."""

from kvstore.retrieval.policies.maxsim import POLICY as MAXSIM
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy

POLICY = Policy(name="auto", source=MAXSIM.source, late=MAXSIM.late, position=PositionPolicy.CONSECUTIVE)
