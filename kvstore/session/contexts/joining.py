# SPDX-License-Identifier: Apache-2.0
"""The blocks of several streams in one order: what all of them begin with, then what is each one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvstore.store import Entry, Manifest


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a block of joined streams comes from.

    Args:
        number: of the stream, as they were named.
        stream: its name.
        entry: the block there.
    """

    number: int
    stream: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class Joined:
    """Several streams as one list of blocks.

    Args:
        entries: numbered through, blocks and tokens; every block once.
        origins: of each entry.
        num_prefix_blocks: the first entries, with which all streams begin.
        ends: for each stream, the index behind its last entry.
    """

    entries: list[Entry]
    origins: list[Origin]
    num_prefix_blocks: int
    ends: list[int]


def join(manifests: Sequence[Manifest], sink_tokens: int) -> Joined:
    """Join streams. Keys name a block and all before it: what two streams begin with has equal ones, and is read once.

    Args:
        manifests: of the streams, at least one.
        sink_tokens: the prefix of a stream that is alone: its blocks that begin within.
    """
    num_prefix = 0
    for together in zip(*(manifest.entries for manifest in manifests), strict=False):
        is_sink = len(manifests) > 1 or together[0].first_token < sink_tokens
        if len({entry.key for entry in together}) > 1 or not is_sink:
            break
        num_prefix += 1
    joined = Joined([], [], num_prefix, [])
    known, first = set(), 0
    for number, manifest in enumerate(manifests):
        for entry in manifest.entries:
            if entry.key not in known:
                known.add(entry.key)
                joined.entries.append(replace(entry, index=len(joined.entries), first_token=first))
                joined.origins.append(Origin(number, manifest.header.name, entry))
                first += entry.num_tokens
        joined.ends.append(len(joined.entries))
    return joined
