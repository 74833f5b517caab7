# SPDX-License-Identifier: Apache-2.0
"""What a scheme is: a way to store a document's keys and values, of which something comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quality.corpus import Corpus


@dataclass(frozen=True, slots=True)
class Coded:
    """A document behind a codec.

    Args:
        keys: [layers, kv_heads, tokens, head_dim] float32, before RoPE.
        values: the same of the values.
        key_bits: stored for K, with all that a reader needs; NaN for a scheme that stores nothing.
        value_bits: stored for V.
    """

    keys: Tensor
    values: Tensor
    key_bits: float
    value_bits: float


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to store keys and values.

    Args:
        name: for the report.
        code: corpus and number of a document -> what comes back.
        is_exact: whether that must be what was given.
    """

    name: str
    code: Callable[[Corpus, int], Coded]
    is_exact: bool = False
