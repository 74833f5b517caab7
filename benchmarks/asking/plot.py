# SPDX-License-Identifier: Apache-2.0
"""Right answers of every policy, without and with an external retriever, drawn as SVG bars without a library."""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape

_LEFT, _WIDTH, _TOP, _ROW = 170, 560, 20, 26
_OWN, _WITH = "#1f77b4", "#ff7f0e"


def bars(shares: Mapping[str, tuple[float, float]]) -> str:
    """An SVG document: one row per name, share of right answers to the right.

    Args:
        shares: (alone, with an external retriever) by name, from the top down.
    """
    height = _TOP + _ROW * len(shares)
    marks = [_LEFT + _WIDTH * tenth / 10 for tenth in range(11)]
    lines = [f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{_TOP}" y2="{height}"/>' for x in marks]
    texts = [f'<text x="{x:.0f}" y="14" text-anchor="middle">{tenth / 10:.1f}</text>' for tenth, x in enumerate(marks)]
    drawn = []
    for number, (name, pair) in enumerate(shares.items()):
        y = _TOP + _ROW * number
        texts.append(f'<text x="{_LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        for lower, (share, colour) in enumerate(zip(pair, (_OWN, _WITH), strict=True)):
            place = f'x="{_LEFT}" y="{y + 3 + 10 * lower}"'
            drawn.append(f'<rect {place} width="{_WIDTH * share:.1f}" height="9" fill="{colour}"/>')
    for number, (label, colour) in enumerate((("by its own keys", _OWN), ("with words of a transcript", _WITH))):
        texts.append(f'<text x="{_LEFT + 240 * number}" y="{height + 20}" fill="{colour}">{label}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 30}" height="{height + 34}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<g stroke="#ddd">{"".join(lines)}</g>{"".join(drawn)}{"".join(texts)}</svg>\n'
    )
