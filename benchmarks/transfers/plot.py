# SPDX-License-Identifier: Apache-2.0
"""Bandwidth over block size, under the roof that the device sets; drawn as SVG without a library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Curve = Sequence[tuple[int, float]]
"""(bytes of a block, GB/s), by size."""

_WIDTH, _HEIGHT = 430, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 170, 40, 50
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2", "#7f7f7f")


def drawing(panels: Mapping[str, Mapping[str, Curve]], roof: str) -> str:
    """An SVG document, one panel beside the other.

    Args:
        panels: by title, the curves by name.
        roof: name of the curve that is the limit, drawn thick.
    """
    width = (_WIDTH + _RIGHT) * len(panels)
    parts = [
        _panel(title, curves, roof, number * (_WIDTH + _RIGHT)) for number, (title, curves) in enumerate(panels.items())
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _panel(title: str, curves: Mapping[str, Curve], roof: str, x0: int) -> str:
    sizes = sorted({size for curve in curves.values() for size, _ in curve})
    rates = [rate for curve in curves.values() for _, rate in curve]
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))
    first, last = math.log2(sizes[0]), math.log2(sizes[-1])
    width, height = _WIDTH - _LEFT, _HEIGHT - _TOP - _BOTTOM

    def x(size: int) -> float:
        return x0 + _LEFT + width * (math.log2(size) - first) / max(last - first, 1)

    def y(rate: float) -> float:
        return _TOP + height * (1 - (math.log10(rate) - low) / (high - low))

    lines = [f'<line x1="{x(sizes[0]):.1f}" x2="{x(sizes[-1]):.1f}" y1="{y(10.0**d):.1f}" y2="{y(10.0**d):.1f}"/>'
             for d in range(low, high + 1)]  # fmt: skip
    lines += [f'<line x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{_TOP}" y2="{_TOP + height}"/>' for s in sizes]
    texts = [f'<text x="{x0 + _LEFT}" y="20" font-size="13">{escape(title)}, GB/s over bytes of a block</text>']
    texts += [f'<text x="{x0 + _LEFT - 6}" y="{y(10.0**d) + 4:.1f}" text-anchor="end">{10.0**d:g}</text>'
              for d in range(low, high + 1)]  # fmt: skip
    texts += [f'<text x="{x(s):.1f}" y="{_TOP + height + 16}" text-anchor="middle">{_short(s)}</text>' for s in sizes]
    drawn, labels = [], sorted(curves, key=lambda name: -curves[name][-1][1])
    for place, name in enumerate(labels):
        colour = "black" if name == roof else _COLOURS[sorted(curves).index(name) % len(_COLOURS)]
        points = " ".join(f"{x(size):.1f},{y(rate):.1f}" for size, rate in curves[name])
        drawn.append(f'<polyline points="{points}" stroke="{colour}" stroke-width="{4 if name == roof else 1.6}"/>')
        at = _TOP + 10 + 16 * place
        texts.append(f'<text x="{x0 + _WIDTH + 10}" y="{at}" fill="{colour}">{escape(name)}</text>')
    return f'<g stroke="#ddd">{"".join(lines)}</g><g fill="none">{"".join(drawn)}</g>{"".join(texts)}'


def _short(nbytes: int) -> str:
    return f"{nbytes >> 20}M" if nbytes >= 1 << 20 else f"{nbytes >> 10}K"
