# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM (arXiv:2309.17453, ICLR 2024): sinks and a window, at their places in the cache; nothing comes back."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy

POLICY = Policy(
    name="streaming_llm",
    source="StreamingLLM, arXiv:2309.17453; what left the window is stored, and never read",
    position=PositionPolicy.SLOT_INDEX,
    recent_tokens=512,
)
