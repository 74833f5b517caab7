# SPDX-License-Identifier: Apache-2.0
"""Retention by frames: what is distinct in them, what stands for them, and which of them show something new.

What text stands between frames is kept before all else. Tokens are compared by their plain keys, heads joined; what the
sources prune before the language model, they compare by its input embeddings, which are gone when keys are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvstore.errors import ConfigError
from kvstore.retrieval.retention.received import best
from kvstore.retrieval.tokens import LayerTokens


@dataclass(frozen=True, slots=True)
class Frames:
    """The video tokens of a run.

    Args:
        places: [num_video] int64: where they are in the run.
        frame: [num_video] int64: which of the frames each belongs to, counted in the run.
        keys: [num_video, kv_heads * key_dim] float32.
        means: [num_frames, kv_heads * key_dim] float32: mean key of each frame.
    """

    places: Tensor
    frame: Tensor
    keys: Tensor
    means: Tensor

    @staticmethod
    def of(tokens: LayerTokens) -> Frames:
        """Find them; raises `ConfigError` where keys are stored rotated."""
        places = (tokens.groups >= 0).nonzero()[:, 0]
        found = torch.unique_consecutive(tokens.groups[places], return_inverse=True, return_counts=True)
        frame, counts = found[1], found[2]
        keys = tokens.plain[:, places].transpose(0, 1).flatten(1)
        means = keys.new_zeros(counts.shape[0], keys.shape[1]).index_add_(0, frame, keys) / counts[:, None]
        return Frames(places, frame, keys, means)

    def novelty(self) -> Tensor:
        """Cosine distance of each frame's mean to that of the frame before it: `[num_frames]`; 2 for the first one."""
        distances = self.means.new_full((self.means.shape[0],), 2.0)
        distances[1:] = 1 - cosine_similarity(self.means[1:], self.means[:-1], dim=1)
        return distances

    def kept(self, tokens: LayerTokens, of_video: Tensor, budget_tokens: int) -> Tensor:
        """Keep text, then the video tokens that score best; -inf for those that go in any case."""
        scores = of_video.new_full((tokens.num_tokens,), float("inf"))
        scores[self.places] = of_video
        return best(scores, budget_tokens)


@dataclass(frozen=True, slots=True)
class DistinctTokens:
    """Keeps the tokens farthest from the mean of all frames and from the mean of their own: the rest is redundant.

    A token scores `alpha * d(token, mean of all) + (1 - alpha) * d(token, mean of its frame)` with cosine distances.

    Source: STC-Pruner (arXiv:2512.00891), with two anchors as in its paper. There the mean of all is one of the frames
    before; ours is of all frames of the run.

    Args:
        alpha: weight of what changes in time, 0 to 1.

    Raises:
        ConfigError: `alpha` is not from 0 to 1.
    """

    keeps_text: ClassVar[bool] = True
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}; it must be from 0 to 1")

    def keep(self, tokens: LayerTokens, budget_tokens: int) -> Tensor:
        """See `Retention`."""
        frames = Frames.of(tokens)
        in_time = 1 - cosine_similarity(frames.keys, frames.keys.mean(dim=0, keepdim=True), dim=1)
        in_frame = 1 - cosine_similarity(frames.keys, frames.means[frames.frame], dim=1)
        return frames.kept(tokens, self.alpha * in_time + (1 - self.alpha) * in_frame, budget_tokens)


@dataclass(frozen=True, slots=True)
class FrameCarriers:
    """Each frame is carried by the few of its tokens that are most like its mean; the rest goes.

    Where even these exceed the budget, frames most like the one before them go first.

    Source: VideoScan (arXiv:2503.09387), which appends one token to a frame, the mean of its features, and trains the
    model for it; ours takes tokens that are there, without training.

    Args:
        num_carriers: tokens that stay of a frame.

    Raises:
        ConfigError: `num_carriers` is not positive.
    """

    keeps_text: ClassVar[bool] = True
    num_carriers: int = 1

    def __post_init__(self) -> None:
        if self.num_carriers < 1:
            raise ConfigError(f"{self.num_carriers} carriers of a frame; at least one must stay")

    def keep(self, tokens: LayerTokens, budget_tokens: int) -> Tensor:
        """See `Retention`."""
        frames = Frames.of(tokens)
        likeness = cosine_similarity(frames.keys, frames.means[frames.frame], dim=1)
        order = likeness.argsort(descending=True, stable=True)
        order = order[frames.frame[order].argsort(stable=True)]  # frame after frame, the best of each first
        counts = torch.bincount(frames.frame, minlength=frames.means.shape[0])
        rank = torch.arange(order.shape[0]) - (counts.cumsum(0) - counts)[frames.frame[order]]
        scores = torch.full_like(likeness, float("-inf"))
        carriers = order[rank < self.num_carriers]
        scores[carriers] = frames.novelty()[frames.frame[carriers]]
        return frames.kept(tokens, scores, budget_tokens)


@dataclass(frozen=True, slots=True)
class NewFrames:
    """Of frames that follow each other and are alike, the first one stays; then what was looked at most, if need be.

    Source: StreamMem (arXiv:2508.15717), which averages such frames, and ranks by the attention of a chat template's
    tokens. A retention may only choose, so ours lets the first one stand for the others; `received` is what the engine
    measured.

    Args:
        threshold: cosine of the means of neighbours above which they are alike.

    Raises:
        ConfigError: `threshold` is not from -1 to 1.
    """

    keeps_text: ClassVar[bool] = True
    threshold: float = 0.95

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"a cosine above {self.threshold}; the bound must be from -1 to 1")

    def keep(self, tokens: LayerTokens, budget_tokens: int) -> Tensor:
        """See `Retention`."""
        frames = Frames.of(tokens)
        is_new = frames.novelty() >= 1 - self.threshold
        received = tokens.received[:, frames.places].sum(dim=0)
        return frames.kept(tokens, received.masked_fill(~is_new[frames.frame], float("-inf")), budget_tokens)
