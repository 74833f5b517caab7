# SPDX-License-Identifier: Apache-2.0
"""StreamingVLM (arXiv:2510.09608): sinks and a window of video and text, counted anew without what went."""

from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy

POLICY = Policy(
    name="streaming_vlm",
    source="StreamingVLM, arXiv:2510.09608, whose window is 16 s of video and 512 tokens of text, each by itself; ours "
    "is one run of tokens of about that size, and its sinks are the stream's",
    position=PositionPolicy.SHRINK,
    recent_tokens=16 * 256 + 512,
)
