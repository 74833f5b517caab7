# SPDX-License-Identifier: Apache-2.0
"""Eviction decisions: which blocks leave a tier that is full. Decides only, moves nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from kvstore.spec import BlockKey

BATCH_FRACTION = 64
"""An eviction frees at least 1/64 of what the tier holds, so that a full tier does not commit once per block."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A block that no stream refers to.

    Args:
        key: the block.
        nbytes: what freeing it gives back.
    """

    key: BlockKey
    nbytes: int


def eviction_target(need_nbytes: int, used_nbytes: int) -> int:
    """Bytes to free when `need_nbytes` do not fit into a tier that holds `used_nbytes`."""
    return max(need_nbytes, used_nbytes // BATCH_FRACTION)


def choose_victims(
    oldest_first: Iterable[Candidate], *, target_nbytes: int, keep: Collection[BlockKey]
) -> list[Candidate]:
    """Take the least recently used blocks until they add up to `target_nbytes`.

    Stops reading `oldest_first` as soon as there is enough, so it may be a cursor over a large table.

    Args:
        oldest_first: candidates in order of last use.
        target_nbytes: bytes wanted; 0 or less takes nothing.
        keep: blocks that the caller is about to use: never chosen.

    Returns:
        The victims, oldest first; fewer bytes than wanted when there are no more candidates.
    """
    victims: list[Candidate] = []
    freed_nbytes = 0
    if target_nbytes <= 0:
        return victims
    for candidate in oldest_first:
        if candidate.key in keep:
            continue
        victims.append(candidate)
        freed_nbytes += candidate.nbytes
        if freed_nbytes >= target_nbytes:
            break
    return victims
