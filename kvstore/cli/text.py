# SPDX-License-Identifier: Apache-2.0
"""How numbers, spans, names and tables are written for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvstore.video.prompt import stamp

if TYPE_CHECKING:
    from kvstore.spec import ModelSpec

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_STEP = 1024


def size(nbytes: float) -> str:
    """Bytes in the largest unit that leaves a whole number before the point: `1.5 GiB`."""
    power = 0
    while abs(nbytes) >= _STEP and power < len(_UNITS) - 1:
        nbytes /= _STEP
        power += 1
    return f"{nbytes:.0f} B" if power == 0 else f"{nbytes:.1f} {_UNITS[power]}"


def count(number: int, noun: str) -> str:
    """A number and what it counts, in the plural where needed: `1 block`, `1,024 blocks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def span(start_s: float, end_s: float) -> str:
    """A stretch of time: `1:02:03-1:02:30`."""
    return f"{stamp(start_s)}-{stamp(end_s)}"


def duration(seconds: object) -> str:
    """A length of time as `1:02:03`; `-` for what is not one."""
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds < 0:
        return "-"
    return stamp(seconds)


def short_time(seconds: float) -> str:
    """A length of time in the unit that suits it, two digits: `16 us`, `4.1 ms`, `33 s`."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds >= 1 / factor or unit == "us":
            break
    return f"{seconds * factor:.2g} {unit}" if seconds * factor < 100 else f"{seconds * factor:.0f} {unit}"


def printable(words: object) -> str:
    """One line that a terminal takes as plain text: line breaks, escapes and broken Unicode are spelled out."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in str(words))


def model(spec: ModelSpec) -> str:
    """A model's family, layers x heads x dim, and dtype: `llama 30x3x64 bfloat16`."""
    return f"{printable(spec.architecture)} {spec.num_layers}x{spec.kv_heads}x{spec.key_dim} {spec.dtype}"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table; the first `left` columns are aligned to the left, the others, numbers, to the right."""
    lines = [titles, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def facts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of names and values, the values under each other."""
    listed = list(pairs)
    width = max(len(name) for name, _ in listed)
    return [f"{name.ljust(width)}  {value}".rstrip() for name, value in listed]
