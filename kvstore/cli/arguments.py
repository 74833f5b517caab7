# SPDX-License-Identifier: Apache-2.0
"""Types of command line arguments: each turns a word into a value, or says what is wrong with it."""

from __future__ import annotations

import math
import re
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]*)?(?:[eE]\+?[0-9]+)?)\s*(?P<unit>[A-Za-z]*)")
_PREFIXES = "kmgtp"
_MAX_NBYTES = 1 << 62


def add_store(parser: ArgumentParser, *, stream: bool | None) -> None:
    """Add `--store` and, unless `stream` is None, `--stream`: required when it is True."""
    parser.add_argument("--store", type=path, required=True, metavar="DIR", help="folder of the store")
    if stream is not None:
        parser.add_argument("--stream", type=text, required=stream, metavar="NAME", help="stream in the store")


def add_model(parser: ArgumentParser) -> None:
    """Add `--model`."""
    parser.add_argument(
        "--model", type=path, metavar="PATH", help="Hugging Face folder or GGUF file (default: SmolLM2-135M-Instruct)"
    )


def size(word: str) -> int:
    """Bytes from `200GiB`, `512MB`, `64k` or `1e9`: KiB and K are 1024, KB is 1000."""
    match = _SIZE.fullmatch(word.strip())
    factor = _factor(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise ArgumentTypeError(f"{word!r} is not a size; write it like 200GiB, 512MB or 1e9")
    nbytes = float(match["number"]) * factor
    if not 1 <= nbytes <= _MAX_NBYTES:
        raise ArgumentTypeError(f"{word!r} is out of range; a size is at least one byte and less than 4 EiB")
    return int(nbytes)


def rate(word: str) -> float:
    """A positive, finite number."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ArgumentTypeError(f"{word!r} is not a positive number")
    return number


def count(word: str) -> int:
    """A whole number, at least 1."""
    number = index(word)
    if number == 0:
        raise ArgumentTypeError("0 is too few; give at least 1")
    return number


def index(word: str) -> int:
    """A whole number, at least 0."""
    if not re.fullmatch(r"[0-9]{1,15}", word):
        raise ArgumentTypeError(f"{word!r} is not a whole number from 0 on")
    return int(word)


def text(word: str) -> str:
    """Words: not blank, and valid Unicode."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"{word!r} is not valid UTF-8") from None
    if not word.strip():
        raise ArgumentTypeError("it is empty")
    return word


def path(word: str) -> Path:
    """A path that the system accepts as one; it need not exist."""
    if not word:
        raise ArgumentTypeError("the path is empty")
    try:
        Path(word).exists()
    except OSError as error:
        raise ArgumentTypeError(f"{word[:80]!r} is not a usable path: {error.strerror}") from None
    return Path(word)


def _factor(unit: str) -> int | None:
    if unit in ("", "b"):
        return 1
    prefix, rest = unit[0], unit[1:]
    base = {"": 1024, "ib": 1024, "b": 1000}.get(rest)
    return None if prefix not in _PREFIXES or base is None else int(base ** (_PREFIXES.index(prefix) + 1))
