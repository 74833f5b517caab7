# SPDX-License-Identifier: Apache-2.0
"""KL over bits per element, drawn as SVG without a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 860, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 20, 50
_MOST_BITS = 10.0


@dataclass(frozen=True, slots=True)
class Point:
    """One scheme.

    Args:
        name: for the label.
        bits: per element of K and V.
        kl: nats a token; positive.
    """

    name: str
    bits: float
    kl: float


def drawing(points: Sequence[Point]) -> str:
    """An SVG document: bits to the right, the logarithm of KL upwards; lower left is better."""
    decades = range(
        math.floor(math.log10(min(p.kl for p in points))), math.ceil(math.log10(max(p.kl for p in points))) + 1
    )
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(bits: float) -> float:
        return _LEFT + width * bits / _MOST_BITS

    def y(kl: float) -> float:
        return _TOP + height * (1 - (math.log10(kl) - decades[0]) / (decades[-1] - decades[0]))

    marks = [f'<line x1="{_LEFT}" x2="{_LEFT + width}" y1="{y(10.0**d):.1f}" y2="{y(10.0**d):.1f}"/>' for d in decades]
    marks += [
        f'<line x1="{x(bits):.1f}" x2="{x(bits):.1f}" y1="{_TOP}" y2="{_TOP + height}"/>'
        for bits in range(int(_MOST_BITS) + 1)
    ]
    texts = [f'<text x="{_LEFT - 8}" y="{y(10.0**d) + 4:.1f}" text-anchor="end">1e{d}</text>' for d in decades]
    texts += [
        f'<text x="{x(bits):.1f}" y="{_TOP + height + 18}" text-anchor="middle">{bits}</text>'
        for bits in range(int(_MOST_BITS) + 1)
    ]
    texts.append(
        f'<text x="{_LEFT}" y="{_HEIGHT - 10}">bits per element, all overheads; upwards: KL, nats per token</text>'
    )
    for point in points:
        texts.append(f'<circle cx="{x(point.bits):.1f}" cy="{y(point.kl):.1f}" r="4"/>')
        texts.append(f'<text x="{x(point.bits) + 7:.1f}" y="{y(point.kl) + 4:.1f}">{escape(point.name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/><g stroke="#ddd">{"".join(marks)}</g>'
        f"{''.join(texts)}</svg>\n"
    )
