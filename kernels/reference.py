# SPDX-License-Identifier: Apache-2.0
"""Every kernel in plain torch: the specification that faster twins are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(query: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """Attend to one run of keys.

    Args:
        query: [batch, num_heads, num_queries, key_dim].
        keys: [batch, kv_heads, num_keys, key_dim]; num_heads is a multiple of kv_heads.
        values: [batch, kv_heads, num_keys, value_dim].
        mask: [batch or 1, 1, num_queries, num_keys] bool, True where a query may look; None lets every query see all.
        scale: multiplies the logits.

    Returns:
        [batch, num_heads, num_queries, value_dim], dtype of `values`.
    """
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )


def attend_two_parts(
    query_far: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    num_far: int,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend to a far part and a near part with differently rotated queries, under one softmax.

    Args:
        query_far: [batch, num_heads, num_queries, key_dim], the query as the first `num_far` keys meet it.
        query: the same query as the other keys meet it.
        keys: [batch, kv_heads, num_keys, key_dim].
        values: [batch, kv_heads, num_keys, value_dim].
        num_far: keys of the far part.
        mask: as in `attend`.
        scale: multiplies the logits.

    Returns:
        [batch, num_heads, num_queries, value_dim], dtype of `values`; sums in float32.

    Source: InfLLM (arXiv:2402.04617) and LM-Infinite (arXiv:2308.16137): one distance for all that is far.
    """
    groups = query.shape[1] // keys.shape[1]
    far = _logits(query_far, keys[:, :, :num_far], groups)
    near = _logits(query, keys[:, :, num_far:], groups)
    logits = torch.cat([far, near], dim=-1) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None], float("-inf"))
    weights = logits.softmax(dim=-1)
    out = torch.einsum("bkgqm,bkmd->bkgqd", weights, values.float())
    return out.flatten(1, 2).to(values.dtype)


def received_mass(query: Tensor, keys: Tensor, *, num_received: int, mask: Tensor | None, scale: float) -> Tensor:
    """Sum the attention that the last `num_received` keys get from these queries.

    Args:
        query: [1, num_heads, num_queries, key_dim].
        keys: [1, kv_heads, num_keys, key_dim].
        num_received: keys, counted from the end, to report.
        mask: as in `attend`.
        scale: multiplies the logits.

    Returns:
        [kv_heads, num_received] float32: sums over queries and over the query heads of each KV head.
    """
    logits = _logits(query, keys, query.shape[1] // keys.shape[1]) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None], float("-inf"))
    return logits.softmax(dim=-1)[0, ..., keys.shape[2] - num_received :].sum(dim=(1, 2))


def _logits(query: Tensor, keys: Tensor, groups: int) -> Tensor:
    grouped = query.unflatten(1, (-1, groups)).float()
    return torch.einsum("bkgqd,bkmd->bkgqm", grouped, keys.float())
