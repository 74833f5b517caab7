# SPDX-License-Identifier: Apache-2.0
"""What an attention kernel is given for one layer of one forward, and the mask over it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ShapeError
from kvstore.kernels.parts_reference import attend_part, context_part, merge_parts
from kvstore.kernels.reference import attend, attend_two_parts, received_mass

_RECEIVED_QUERIES = 32


@dataclass(frozen=True, slots=True)
class ContextRule:
    """Keys that are attended with a temperature and a scale of their own; see `context_part`.

    Args:
        rows: which keys.
        temperature: divides their logits.
        scale: multiplies their joint log-sum-exp, as the temperature does.
    """

    rows: slice
    temperature: float
    scale: float


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What an attention kernel needs for one layer of one forward.

    Args:
        query: [batch, num_heads, num_new, key_dim], rotated.
        keys: [batch, kv_heads, num_keys, key_dim], rotated; past first, then tail, the new tokens last.
        values: [batch, kv_heads, num_keys, value_dim].
        num_past: keys before the tail; every query may see them.
        query_far: the query as the first `num_far` keys meet it; None when `num_far` is 0.
        num_far: keys that are attended at one constant distance.
        past_bias: [1 or kv_heads, num_past] float32, added to the logits of the past; None for zeros.
        context: keys of the past with a rule of their own; it goes with no far part and no bias but -inf.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    num_past: int
    query_far: Tensor | None
    num_far: int
    past_bias: Tensor | None = None
    context: ContextRule | None = None

    def mask(self, tail_mask: Tensor | None) -> Tensor | None:
        """Widen a mask over the tail to one over all keys.

        Args:
            tail_mask: [batch, 1, num_new, num_tail] bool, True where a query may look; None means causal.

        Returns:
            [batch or 1, 1, num_new, num_keys] bool, or None when every query sees every key; or, where the past has a
            bias, what to add to the logits: [batch or 1, num_heads, num_new, num_keys], dtype of `query`.
        """
        allowed = self._allowed(tail_mask)
        if self.past_bias is None:
            return allowed
        heads, num_new, num_keys = self.query.shape[1], self.query.shape[2], self.keys.shape[2]
        bias = self.past_bias.repeat_interleave(heads // self.past_bias.shape[0], dim=0).to(self.query.dtype)
        bias = torch.nn.functional.pad(bias, (0, num_keys - self.num_past))[None, :, None]
        if allowed is None:
            return bias.expand(-1, -1, num_new, -1)
        return torch.where(allowed, bias, float("-inf"))

    def _allowed(self, tail_mask: Tensor | None) -> Tensor | None:
        num_new, num_keys = self.query.shape[2], self.keys.shape[2]
        if tail_mask is None:
            if num_new == 1:
                return None
            return _causal_mask(num_new, num_keys, self.query.device)
        if tail_mask.shape[-1] != num_keys - self.num_past:
            raise ShapeError(f"the mask covers {tail_mask.shape[-1]} keys; the tail has {num_keys - self.num_past}")
        if self.num_past == 0:
            return tail_mask
        return torch.nn.functional.pad(tail_mask, (self.num_past, 0), value=True)

    @property
    def is_grouped(self) -> bool:
        """Whether `attend` is faster than kernels that see head by head, and gives the same bits."""
        groups = self.query.shape[1] // self.keys.shape[1]
        is_plain = self.query_far is None and self.context is None
        return is_plain and groups > 1 and self.query.dtype.itemsize == 2 and self.keys.device.type == "cpu"

    def attend(self, mask: Tensor | None, scale: float) -> Tensor:
        """Attend with the reference kernels: `[batch, num_heads, num_new, value_dim]`."""
        if self.query_far is not None:
            return attend_two_parts(
                self.query_far, self.query, self.keys, self.values, num_far=self.num_far, mask=mask, scale=scale
            )
        if self.context is not None:
            return self._attend_in_parts(self.context, mask, scale)
        if self.is_grouped:
            return self._attend_in_groups(mask, scale)
        return attend(self.query, self.keys, self.values, mask=mask, scale=scale)

    def _attend_in_groups(self, mask: Tensor | None, scale: float) -> Tensor:
        """Attend with the heads of a group as rows of one product: no key is repeated, and of one row torch is slow."""
        batch, num_heads, num_new, key_dim = self.query.shape
        kv_heads = self.keys.shape[1]
        groups = num_heads // kv_heads
        if mask is not None and num_new > 1:
            rule = (num_new, self.keys.shape[2], self.query.device)
            if mask is _causal_mask(*rule):
                mask = _causal_bias(*rule, groups, self.query.dtype)
            else:
                mask = (mask[:, ::groups] if mask.shape[1] > 1 else mask).repeat(1, 1, groups, 1)
        elif mask is not None and mask.shape[1] > 1:
            mask = mask[:, ::groups]  # the heads of a group see the same
        grouped = self.query.reshape(batch, kv_heads, groups * num_new, key_dim)
        found = attend(grouped, self.keys, self.values, mask=mask, scale=scale)
        return found.reshape(batch, num_heads, num_new, found.shape[3])

    def _attend_in_parts(self, rule: ContextRule, mask: Tensor | None, scale: float) -> Tensor:
        within = torch.zeros(self.keys.shape[2], dtype=torch.bool, device=self.keys.device)
        within[rule.rows] = True
        if mask is None:
            mask = torch.ones(1, 1, self.query.shape[2], self.keys.shape[2], dtype=torch.bool, device=self.keys.device)
        if mask.shape[1] > 1:
            mask = mask[:, :: mask.shape[1] // self.keys.shape[1]]  # the heads of a group see the same
        allowed = mask if mask.dtype is torch.bool else mask.isfinite()
        inside = context_part(
            self.query,
            self.keys[:, :, within],
            self.values[:, :, within],
            temperature=rule.temperature,
            context_scale=rule.scale,
            mask=allowed[..., within],
            scale=scale,
        )
        outside = attend_part(
            self.query, self.keys[:, :, ~within], self.values[:, :, ~within], mask=allowed[..., ~within], scale=scale
        )
        return merge_parts([inside, outside])[0].to(self.values.dtype)

    def received(self, num_received: int, num_spare: int, scale: float) -> Tensor:
        """Estimate the attention that the last keys get, among the near ones, from evenly spaced queries.

        Args:
            num_received: keys, counted from the end, to report.
            num_spare: last queries that do not count.
            scale: multiplies the logits.

        Returns:
            [kv_heads, num_received] float32.
        """
        count = self.query.shape[2] - num_spare
        asking = slice(0, count, max(count // _RECEIVED_QUERIES, 1))
        mask = self.mask(None)
        if mask is not None:
            mask = mask if mask.dtype is torch.bool else mask.isfinite()
            first = self.num_far if self.past_bias is not None else self.num_past  # before it, all is seen
            mask = mask[:, :, asking, first:]
        keys = self.keys[:, :, self.num_far :]  # the far ones are not rotated, and this query is
        return received_mass(self.query[:, :, asking], keys, num_received=num_received, mask=mask, scale=scale)


@functools.lru_cache(maxsize=2)
def _causal_mask(num_new: int, num_keys: int, device: torch.device) -> Tensor:
    """The causal mask of new tokens behind older keys; kept, because every layer of a forward wants the same."""
    ones = torch.ones(num_new, num_keys, dtype=torch.bool, device=device)
    return ones.tril(diagonal=num_keys - num_new)[None, None]


@functools.lru_cache(maxsize=2)
def _causal_bias(num_new: int, num_keys: int, device: torch.device, groups: int, dtype: torch.dtype) -> Tensor:
    """The same to be added, once for each head of a group: torch takes a fifth longer with marks."""
    hidden = ~_causal_mask(num_new, num_keys, device)
    return (
        torch.zeros(hidden.shape, dtype=dtype, device=device)
        .masked_fill_(hidden, float("-inf"))
        .repeat(1, 1, groups, 1)
    )
