# SPDX-License-Identifier: Apache-2.0
"""Content ids: one integer per token that names what the token is, for block keys."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from kvstore.errors import ShapeError


def content_ids(input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor | None = None) -> Tensor:
    """Name the tokens of the first sequence of a forward.

    Args:
        input_ids: [batch, num_tokens] int64, or None.
        inputs_embeds: [batch, num_tokens, hidden] where there are no ids (vision towers): a row is named by its hash.
        position_ids: [rows, batch, num_tokens] int64 of M-RoPE, hashed with the row: plain pictures of another shape
            differ in nothing else.

    Returns:
        [num_tokens] int64 on the CPU.

    Raises:
        ShapeError: neither was given.
    """
    if input_ids is not None:
        return input_ids[0].detach().to("cpu", torch.int64)
    if inputs_embeds is None:
        raise ShapeError("the forward has neither input_ids nor inputs_embeds")
    rows = inputs_embeds[0].detach().cpu().contiguous().view(torch.uint8)
    if position_ids is not None and position_ids.dim() == 3:
        where = position_ids[:, 0].detach().cpu().to(torch.int64).T.contiguous().view(torch.uint8)
        rows = torch.cat([rows, where], dim=1)
    hashed = [
        int.from_bytes(hashlib.blake2b(row.numpy().tobytes(), digest_size=8).digest(), "little", signed=True)
        for row in rows
    ]
    return torch.tensor(hashed, dtype=torch.int64)
