# SPDX-License-Identifier: Apache-2.0
"""Thinning: which filter a stream goes through before it is stored, and how much of how long runs that leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.retrieval.retention.retention import Retention
from kvstore.retrieval.tokens import LayerTokens


@dataclass(frozen=True, slots=True)
class Thinning:
    """How a stream is thinned: run by run, the newest one waiting whole until it is long enough.

    Every block keeps a token, so that its time stays on record, and every run its last one, so that the stream's end
    does.

    Args:
        retention: chooses among the tokens of a run.
        share: of the tokens that it may drop, those that stay at most: of all, or, where it keeps text, of those of
            frames.
        run_tokens: tokens that are looked at together.

    Raises:
        ConfigError: `share` is not above 0 and at most 1, or `run_tokens` is not positive.
    """

    retention: Retention
    share: float = 0.5
    run_tokens: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"a share of {self.share} of the tokens; it must be above 0 and at most 1")
        if self.run_tokens < 1:
            raise ConfigError(f"runs of {self.run_tokens} tokens; they must hold at least one")

    def concerns(self, groups: Iterable[int]) -> bool:
        """Whether something of blocks of these frame groups, -1 for text, may be dropped."""
        return not self.retention.keeps_text or any(group >= 0 for group in groups)

    def kept(self, tokens: LayerTokens, sizes: Sequence[int]) -> list[Tensor]:
        """Choose what stays of a run.

        Args:
            tokens: the run.
            sizes: tokens of each of its blocks.

        Returns:
            For each block the places in it that stay, at least one: `[num_kept]` int64, ascending.

        Raises:
            ConfigError: keys are stored rotated, and the filter compares them before RoPE.
        """
        num_frame = int((tokens.groups >= 0).sum()) if self.retention.keeps_text else tokens.num_tokens
        budget = tokens.num_tokens - num_frame + math.ceil(self.share * num_frame)
        stays = torch.zeros(tokens.num_tokens, dtype=torch.bool)
        stays[self.retention.keep(tokens, budget)] = True
        stays[-1] = True
        kept = []
        for of_block in stays.split(list(sizes)):
            of_block[-1] |= not bool(of_block.any())
            kept.append(of_block.nonzero()[:, 0])
        return kept
