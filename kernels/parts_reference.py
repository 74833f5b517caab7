# SPDX-License-Identifier: Apache-2.0
"""Attention over parts of the keys, merged under one softmax; in plain torch, as the specification of faster twins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]
"""Attention over a part: the output, `[batch, num_heads, num_queries, value_dim]` float32, and the log-sum-exp of its
logits, `[batch, num_heads, num_queries]` float32; 0 and -inf where a query sees nothing."""


def attend_part(query: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, scale: float) -> Part:
    """Attend to some of the keys, and say how much these weigh against others.

    Args:
        query: [batch, num_heads, num_queries, key_dim].
        keys: [batch, kv_heads, num_keys, key_dim]; num_heads is a multiple of kv_heads, num_keys may be 0.
        values: [batch, kv_heads, num_keys, value_dim].
        mask: [batch or 1, kv_heads or 1, num_queries or 1, num_keys] bool, True where a query may look, or float32,
            added to the logits; None lets every query see all.
        scale: multiplies the logits.

    Returns:
        See `Part`.
    """
    logits = _grouped_logits(query, keys, scale)
    if mask is not None:
        wide = mask[:, :, None]
        logits = logits.masked_fill(~wide, float("-inf")) if mask.dtype is torch.bool else logits + wide
    return _part(logits, values.float())


def context_part(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    temperature: float,
    context_scale: float,
    mask: Tensor | None,
    scale: float,
) -> Part:
    """Attend to contexts that were read side by side, as if they had been read one behind the other.

    Weights inside of the part are those of `logits / temperature`, and against other parts it weighs as if its
    log-sum-exp were `context_scale * temperature * logsumexp(logits / temperature)`. With 1 and 1 it is `attend_part`.

    Args:
        query: as in `attend_part`, like all that is not named here.
        keys: of all contexts.
        values: likewise.
        temperature: below 1 it sharpens what many contexts beside each other have blurred.
        context_scale: below 1 it takes back weight that the contexts have together.
        mask: likewise.
        scale: multiplies the logits.

    Returns:
        See `Part`.

    Source: APE (arXiv:2502.05431), by the log-sum-exps of its code.
    """
    out, part_sum = attend_part(query, keys, values, mask=mask, scale=scale / temperature)
    return out, part_sum * (context_scale * temperature)


def estimated_part(query: Tensor, centroids: Tensor, counts: Tensor, value_sums: Tensor, *, scale: float) -> Part:
    """Attend to units of keys as if all keys of a unit were its mean; exact where they are.

    Args:
        query: [batch, num_heads, num_queries, key_dim].
        centroids: [batch, kv_heads, num_units, key_dim]: mean keys.
        counts: [batch, kv_heads, num_units] float32: keys of each unit; 0 for a unit that is to be ignored.
        value_sums: [batch, kv_heads, num_units, value_dim]: sums of the values.
        scale: multiplies the logits.

    Returns:
        See `Part`.

    Source: RetroInfer (arXiv:2505.02922), its estimation zone.
    """
    logits = _grouped_logits(query, centroids, scale) + counts.log()[:, :, None, None]
    return _part(logits, value_sums.float() / counts.clamp_min(1)[..., None])


def merge_parts(parts: Sequence[Part]) -> Part:
    """Merge attention over parts that share no key to that over all of them.

    Args:
        parts: at least one.

    Returns:
        The same of the whole.
    """
    sums = torch.stack([part_sum for _, part_sum in parts])
    whole = sums.logsumexp(dim=0)
    shares = (sums - whole).exp().nan_to_num(0.0)  # a query that sees nothing anywhere has -inf minus -inf
    outs = torch.stack([out for out, _ in parts])
    return (outs * shares[..., None]).sum(dim=0), whole


def _grouped_logits(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    return torch.einsum("bkgqd,bkmd->bkgqm", grouped, keys.float()) * scale


def _part(logits: Tensor, values: Tensor) -> Part:
    weights = logits.softmax(dim=-1).nan_to_num(0.0)
    out = torch.einsum("bkgqm,bkmd->bkgqd", weights, values)
    return out.flatten(1, 2), logits.logsumexp(dim=-1).flatten(1, 2)
