# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md sections 4.4 and 7: the frozen tables, read from their normative literals, and the functions on them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.oracle.rans import TOTAL, Tables

_CSRC = Path(__file__).parents[2] / "csrc"
_MAX_RADIUS = 63
MAX_CODE = 800

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


def _literals() -> list[list[int]]:
    (path,) = _CSRC.glob("*/class_tables.inc")
    text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    return [[int(number, 0) for number in braced.split(",")] for braced in re.findall(r"\{(.*?)\}", text, re.DOTALL)]


def _class_tables(radius: list[int], halves: list[int]) -> Tables:
    """All classes over the symbols -63 .. 63."""
    frequency = np.zeros((len(radius), 2 * _MAX_RADIUS + 1), dtype=np.int64)
    at = 0
    for k, r in enumerate(radius):
        half = halves[at : at + r + 1]
        frequency[k, _MAX_RADIUS - r : _MAX_RADIUS + r + 1] = half[:0:-1] + half
        at += r + 1
    assert at == len(halves)
    assert (frequency.sum(axis=1) == TOTAL).all()
    return Tables(-_MAX_RADIUS, frequency)


_radius, _halves, _exp2_bits, _log16 = _literals()
RADIUS = np.array(_radius, dtype=np.int64)
CLASSES = _class_tables(_radius, _halves)
_EXP2 = np.array(_exp2_bits, dtype=np.uint32).view(np.float32)
_LOG16 = np.array(_log16, dtype=np.int64)


def clamp_code(code: Integers) -> Integers:
    return np.clip(code, -MAX_CODE, MAX_CODE)


def step(code: Integers) -> Floats:
    """2^(code / 8) for clamped codes."""
    return np.asarray(np.ldexp(_EXP2[code & 7], (code >> 3).astype(np.int32)), dtype=np.float32)


def log16(m: Floats) -> tuple[Integers, NDArray[np.bool_]]:
    """16 log2(m), rounded; and where m counts as zero (the logarithm is then of no meaning)."""
    bits = m.astype(np.float32).view(np.uint32).astype(np.int64)
    above = ((bits & 0x7FFFFF)[..., None] >= _LOG16).sum(axis=-1)
    return 16 * ((bits >> 23) - 127) + above, m < np.float32(2.0**-120)


def sum16(v: Floats) -> Floats:
    """Sum over the last axis in sixteen partial sums, as section 9 orders them."""
    partial = np.zeros((*v.shape[:-1], 16), dtype=np.float32)
    for i in range(v.shape[-1]):
        partial[..., i % 16] += v[..., i]
    for half in (8, 4, 2, 1):
        partial = partial[..., :half] + partial[..., half : 2 * half]
    return partial[..., 0]
