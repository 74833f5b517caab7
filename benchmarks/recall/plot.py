# SPDX-License-Identifier: Apache-2.0
"""Recovered attention over the budget, one line per chooser, drawn as SVG without a library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 860, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 230, 20, 50
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
_LABEL_HEIGHT = 15.0


def drawing(lines: Mapping[str, Mapping[int, float]]) -> str:
    """An SVG document: the logarithm of the budget in tokens to the right, share of attention upwards.

    Args:
        lines: share by budget, by name; budgets alike for all, at least two.
    """
    budgets = sorted(next(iter(lines.values())))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    span = math.log2(budgets[-1] / budgets[0])

    def x(budget: int) -> float:
        return _LEFT + width * math.log2(budget / budgets[0]) / span

    def y(share: float) -> float:
        return _TOP + height * (1 - share)

    shares = [tenth / 10 for tenth in range(11)]
    marks = [f'<line x1="{_LEFT}" x2="{_LEFT + width}" y1="{y(s):.1f}" y2="{y(s):.1f}"/>' for s in shares]
    marks += [f'<line x1="{x(b):.1f}" x2="{x(b):.1f}" y1="{_TOP}" y2="{_TOP + height}"/>' for b in budgets]
    texts = [f'<text x="{_LEFT - 8}" y="{y(s) + 4:.1f}" text-anchor="end">{s:.1f}</text>' for s in shares]
    texts += [f'<text x="{x(b):.1f}" y="{_TOP + height + 18}" text-anchor="middle">{b}</text>' for b in budgets]
    texts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 10}">tokens read; upwards: share of attention to the middle</text>')
    curves = []
    lowest = math.inf
    for number, name in enumerate(sorted(lines, key=lambda name: lines[name][budgets[-1]])):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{x(budget):.1f},{y(lines[name][budget]):.1f}" for budget in budgets)
        curves.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        # Labels from the lowest line up, each above the one before.
        lowest = min(y(lines[name][budgets[-1]]), lowest - _LABEL_HEIGHT)
        texts.append(f'<text x="{_LEFT + width + 8}" y="{lowest + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/><g stroke="#ddd">{"".join(marks)}</g>'
        f"{''.join(curves)}{''.join(texts)}</svg>\n"
    )
