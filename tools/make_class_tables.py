# SPDX-License-Identifier: Apache-2.0
"""Generates csrc/entropy/class_tables.inc: the frozen tables of FORMAT.md, sections 4.4 and 7, in integers alone."""

from __future__ import annotations

import sys
from pathlib import Path

NUM_CLASSES = 16
TOTAL = 1024
MAX_RADIUS = 63
_ONE = 1 << 96  # fixed point
_STEPS = 64  # midpoints per symbol


def exp_negative(numerator: int, denominator: int) -> int:
    """exp(-numerator / denominator) in fixed point: halved until small, Taylor, squared back."""
    x = numerator * _ONE // denominator
    halvings = max(0, x.bit_length() - 96 + 4)
    x >>= halvings
    term = total = _ONE
    for n in range(1, 40):
        term = -(-term * x // _ONE // n) if n % 2 else term * x // _ONE // n
        total += -term if n % 2 else term
    for _ in range(halvings):
        total = total * total // _ONE
    return total


def root(numerator: int, power: int) -> int:
    """floor(2^(numerator / 2^power) in fixed point), by repeated integer square roots."""
    value = _ONE << numerator // (1 << power)
    fraction = numerator % (1 << power)
    for bit in range(power):
        if fraction & (1 << (power - 1 - bit)):
            factor = 2 * _ONE
            for _ in range(bit + 1):
                factor = isqrt(factor * _ONE)
            value = value * factor // _ONE
    return value


def isqrt(value: int) -> int:
    """Floor of the square root."""
    guess = 1 << (value.bit_length() + 1) // 2
    while (better := (guess + value // guess) // 2) < guess:
        guess = better
    return guess


def radius(k: int) -> int:
    """clamp(ceil(4.5 * 2^((k - 6) / 2)), 1, MAX_RADIUS), from squares."""
    wanted = 1
    while wanted < MAX_RADIUS and 4 * 64 * wanted * wanted < 81 << k:
        wanted += 1
    return wanted


def mass(symbol: int, k: int) -> int:
    """Mass of [symbol - 1/2, symbol + 1/2] under the mixture, up to a factor that all symbols share."""
    total = 0
    for step in range(_STEPS):
        u = 2 * _STEPS * symbol - _STEPS + 2 * step + 1  # in units of 1 / (2 * _STEPS)
        # u^2 / (2 sigma^2) with sigma^2 = 2^(k - 6), and with (2 sigma)^2
        numerator, denominator = u * u * 64, (2 * _STEPS) ** 2 * 2 << k
        total += 62 * exp_negative(numerator, denominator) + exp_negative(numerator, 4 * denominator)
    return total


def frequencies(k: int) -> list[int]:
    """f(0) .. f(R): rounded shares, at least 1, what is left over or lacking goes to the middle."""
    r = radius(k)
    masses = [mass(symbol, k) for symbol in range(r + 1)]
    whole = masses[0] + 2 * sum(masses[1:])
    found = [max(1, (2 * TOTAL * each + whole) // (2 * whole)) for each in masses]
    found[0] = TOTAL - 2 * sum(found[1:])
    while found[0] < found[1]:  # many tails of 1: take from the largest beside the middle
        largest = max(range(1, r + 1), key=lambda symbol: found[symbol])
        found[largest] -= 1
        found[0] += 2
    return found


def exp2_bits(index: int) -> int:
    """Bits of 2^(index / 8) as binary32, rounded to nearest."""
    mantissa = (root(index, 3) * (1 << 24) // _ONE + 1) >> 1
    return (127 << 23) + mantissa - (1 << 23)


def log16_threshold(index: int) -> int:
    """LOG16 of FORMAT.md: ceil(2^23 * (2^((2 index + 1) / 32) - 1))."""
    return -((_ONE - root(2 * index + 1, 5)) * (1 << 23) // _ONE)


def rows(values: list[str]) -> str:
    """Literals, as many a line as fit."""
    lines, line = [], ""
    for value in values:
        if len(line) + len(value) + 2 > 98:
            lines.append(line.rstrip())
            line = ""
        line += value + ", "
    return "\n    ".join([*lines, line.rstrip()]).rstrip(",")


def text() -> str:
    """The whole file."""
    tables = [frequencies(k) for k in range(NUM_CLASSES)]
    flat = [str(f) for table in tables for f in table]
    exp2 = [f"0x{exp2_bits(i):08X}" for i in range(8)]
    log16 = [str(log16_threshold(i)) for i in range(16)]
    return (
        "// SPDX-License-Identifier: Apache-2.0\n"
        "// Frozen by version 1.0 of FORMAT.md; made by tools/make_class_tables.py.\n\n"
        "// RADIUS\nconstexpr std::uint8_t kRadius[16] = {\n    "
        + rows([str(radius(k)) for k in range(NUM_CLASSES)])
        + "};\n\n// f(0) .. f(R) of class 0, then of class 1, ...\n"
        + f"constexpr std::uint16_t kHalfFrequencies[{len(flat)}] = {{\n    "
        + rows(flat)
        + "};\n\n// EXP2, as bits of binary32\nconstexpr std::uint32_t kExp2Bits[8] = {\n    "
        + rows(exp2)
        + "};\n\n// LOG16\nconstexpr std::uint32_t kLog16[16] = {\n    "
        + rows(log16)
        + "};\n"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_class_tables.py csrc/entropy/class_tables.inc")
    Path(sys.argv[1]).write_text(text(), encoding="utf-8")
