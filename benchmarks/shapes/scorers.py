# SPDX-License-Identifier: Apache-2.0
"""How policies choose among made-up units on any device: their views by the scoring kernel, their fusion, the best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.kernels.dispatch import score_units
from kvstore.kernels.scoring_reference import Agreement, best_of
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.retrieval.view import Group
from shapes.models import Shape


@dataclass(frozen=True, slots=True)
class PageScorer:
    """A policy that cuts pages, without its place in a stream.

    Args:
        policy: which.
        page_tokens: tokens of its pages.
        shape: the model.
    """

    policy: Policy
    page_tokens: int
    shape: Shape

    @staticmethod
    def of(policy: Policy, shape: Shape) -> PageScorer:
        """The scorer of a policy; raises `ConfigError` for one whose units are not pages."""
        if not isinstance(policy.segmenter, Pages):
            raise ConfigError(f"policy {policy.name} has no pages of one size; its units cannot be made up")
        return PageScorer(policy, policy.segmenter.num_tokens, shape)

    def widths(self) -> list[int]:
        """Elements of a summary, by view."""
        return [view.summariser.width(self.shape.dim) for view in self.policy.views]

    def summaries(self, num_tokens: int, device: torch.device, chance: torch.Generator) -> list[Tensor]:
        """Made-up summaries of one layer, by view: [kv_heads, num_pages, width] bfloat16."""
        num_pages = num_tokens // self.page_tokens
        return [
            torch.randn(self.shape.kv_heads, num_pages, width, generator=chance).bfloat16().to(device)
            for width in self.widths()
        ]

    def choose(self, query: Tensor, summaries: list[Tensor], budget_tokens: int) -> Tensor:
        """The best pages of one layer.

        Args:
            query: [kv_heads, group, dim] float32, turned as each view wants it.
            summaries: see `summaries`.
            budget_tokens: tokens of the pages.

        Returns:
            [kv_heads, num_best] int64, or [1, num_best] where all heads choose together.
        """
        scores = [self._score(number, query, rows) for number, rows in enumerate(summaries)]
        return best_of(self.policy.fusion.fuse(scores), budget_tokens // self.page_tokens)[1]

    def _score(self, number: int, query: Tensor, summaries: Tensor) -> Tensor:
        view, together = self.policy.views[number], 1
        lifted = view.scorer.lift(query)
        if view.group is Group.SUM:
            lifted = lifted.sum(dim=1, keepdim=True)
        if view.is_shared:
            together = self.shape.kv_heads
        if lifted.shape[2] == 1:  # it says the same to every query: nothing is multiplied
            return summaries[:, :, 0].float()
        agreement = Agreement(str(view.group), scale=self.shape.dim**-0.5, num_together=together)
        return score_units(lifted.to(summaries.dtype), summaries, None, agreement)
