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
        mask: [batch or 1, 1 or num_heads, num_queries, num_keys] bool, True where a query may look, or of the query's
            dtype, added to the logits; None lets every query see all.
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
        grouped = mask.unflatten(1, (-1, groups)) if mask.shape[1] > 1 else mask[:, :, None]
        logits = logits.masked_fill(~grouped, float("-inf")) if mask.dtype is torch.bool else logits + grouped
    weights = logits.softmax(dim=-1)
    out = torch.einsum("bkgqm,bkmd->bkgqd", weights, values.float())
    return out.flatten(1, 2).to(values.dtype)


def received_mass(query: Tensor, keys: Tensor, *, num_received: int, mask: Tensor | None, scale: float) -> Tensor:
    """Sum the attention that the last `num_received` keys get from these queries.

    Args:
        query: [1, num_heads, num_queries, key_dim].
        keys: [1, kv_heads, num_keys, key_dim].
        num_received: keys, counted from the end, to report.
        mask: as in `attend`, bool; or of the last keys only, where the queries may look at all others.
        scale: multiplies the logits.

    Returns:
        [kv_heads, num_received] float32: sums over queries and over the query heads of each KV head.
    """
    kv_heads, num_queries = keys.shape[1], query.shape[2]
    # A group's heads follow each other: one product per KV head.
    folded = query[0].reshape(kv_heads, -1, query.shape[3]).float() * scale
    logits = torch.bmm(folded, keys[0].float().transpose(1, 2))
    if mask is not None:
        allowed = mask[0].unflatten(0, (kv_heads, -1)) if mask.shape[1] > 1 else mask
        logits = logits.view(kv_heads, -1, num_queries, keys.shape[2])
        logits[..., keys.shape[2] - allowed.shape[-1] :].masked_fill_(~allowed, float("-inf"))
        logits = logits.flatten(1, 2)
    return logits.softmax(dim=-1)[..., keys.shape[2] - num_received :].sum(dim=1)


def rotate_gather(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    row_starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
) -> None:
    """Gather blocks of one layer from their slots into a contiguous run, and rotate the keys in NeoX halves.

    Block i lies in slot `slots[i]` and becomes rows `[row_starts[i], row_starts[i + 1])`; rows that no block names stay
    as they are. Where cos is 1 and sin is 0, a key stays as it is. Elements of a row are adjacent in memory; all else
    may be strided, so one layer of a device pool and a context with spare room fit without a copy.

    Args:
        keys: [num_slots, kv_heads, block_tokens, key_dim], one layer of every slot; key_dim is even.
        values: [num_slots, kv_heads, block_tokens, value_dim].
        slots: [num_blocks] int32.
        row_starts: [num_blocks + 1] int32, ascending.
        cos: [num_rows, key_dim], dtype of `keys`.
        sin: the same.
        out_keys: [kv_heads, num_rows, key_dim], dtype of `keys`; written.
        out_values: [kv_heads, num_rows, value_dim], dtype of `values`; written.
    """
    counts = (row_starts[1:] - row_starts[:-1]).long()
    slot_of_row = slots.long().repeat_interleave(counts)
    dense = torch.arange(slot_of_row.shape[0], device=keys.device) + row_starts[0]
    row = dense - row_starts[:-1].long().repeat_interleave(counts)
    found = keys[slot_of_row, :, row].transpose(0, 1)
    low, high = found.chunk(2, dim=-1)
    out_keys[:, dense] = found * cos[dense] + torch.cat([-high, low], dim=-1) * sin[dense]
    out_values[:, dense] = values[slot_of_row, :, row].transpose(0, 1)


def best_similarity(question: Tensor, rows: Tensor, row_starts: Tensor) -> Tensor:
    """Find, per question token and block, the largest inner product with a row of the block.

    Args:
        question: [num_queries, dim].
        rows: [num_rows, dim], dtype of `question`; block i holds rows `[row_starts[i], row_starts[i + 1])`.
        row_starts: [num_blocks + 1] int32, ascending.

    Returns:
        [num_queries, num_blocks] float32; -inf for a block without rows.
    """
    counts = (row_starts[1:] - row_starts[:-1]).long()
    block_of_row = torch.arange(counts.shape[0], device=rows.device).repeat_interleave(counts)
    named = rows[int(row_starts[0]) : int(row_starts[-1])]
    best = torch.full((question.shape[0], counts.shape[0]), float("-inf"), device=rows.device)
    similarity = question.float() @ named.float().T
    return best.scatter_reduce_(1, block_of_row.expand_as(similarity), similarity, "amax")


def _logits(query: Tensor, keys: Tensor, groups: int) -> Tensor:
    grouped = query.unflatten(1, (-1, groups)).float()
    return torch.einsum("bkgqd,bkmd->bkgqm", grouped, keys.float())
