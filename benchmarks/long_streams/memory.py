# SPDX-License-Identifier: Apache-2.0
"""What a process holds: its largest resident set so far, and what is resident now, by kind."""

from __future__ import annotations

from pathlib import Path

_FIELDS = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "files"}


def resident_nbytes() -> dict[str, int]:
    """`peak`: the largest resident set since the program began, pages of mapped files included. Now: `anonymous`
    (heaps, arenas, pools) and `files` (libraries, the mapped catalogue). `ru_maxrss` would begin with the parent's.
    """
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in _FIELDS:
            found[_FIELDS[name]] = int(value.split()[0]) << 10
    return found
