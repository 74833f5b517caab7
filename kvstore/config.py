# SPDX-License-Identifier: Apache-2.0
"""Settings of a store: who may write, what survives a power cut, how much memory and disk it may take."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kvstore.errors import ConfigError


class Access(StrEnum):
    """What a process may do with a store: one writer, any number of readers."""

    READ = "read"
    WRITE = "write"


class Durability(StrEnum):
    """What a write survives once it is acknowledged, and when that is; docs/durability.md has the reasons.

    `NONE` survives the death of the process (`kill -9`), not of the machine. `COMMIT` also survives a power cut:
    extents are synced before the catalogue names them, and the catalogue syncs each commit. Both acknowledge an
    `append` with the `flush` that follows it, and a `put` when it returns. `SYNC` is `COMMIT` whose every `append`
    returns acknowledged: it needs no `flush`, and waits for the device each time.
    """

    NONE = "none"
    COMMIT = "commit"
    SYNC = "sync"

    @property
    def survives_power_cut(self) -> bool:
        """Whether what is acknowledged has been synced to the device."""
        return self is not Durability.NONE


class Eviction(StrEnum):
    """Who leaves the host tier when it is full; docs/tiers.md says when which is better."""

    LRU = "lru"
    S3_FIFO = "s3-fifo"
    LFU = "lfu"
    PARTICIPATION = "participation"


class Admission(StrEnum):
    """Which blocks enter a tier: all that come, or those that are used a second time."""

    ALWAYS = "always"
    SECOND_USE = "second-use"


@dataclass(frozen=True, slots=True)
class HostConfig:
    """How the host tier is shared.

    Args:
        eviction: who leaves when it is full.
        admission: which blocks that were read stay in it.
        stream_nbytes: most bytes of one stream's blocks; None for no limit.
        put_admission: which plain blocks are written to disk: all, or those that are used a second time.

    Raises:
        ConfigError: a name that is none, or a negative size.
    """

    eviction: Eviction = Eviction.LRU
    admission: Admission = Admission.ALWAYS
    stream_nbytes: int | None = None
    put_admission: Admission = Admission.ALWAYS

    @staticmethod
    def named(eviction: str, admission: str, stream_nbytes: int | None, put_admission: str) -> HostConfig:
        """Make it from what users write."""
        try:
            return HostConfig(Eviction(eviction), Admission(admission), stream_nbytes, Admission(put_admission))
        except ValueError as error:
            choices = ", ".join((*Eviction, *Admission))
            found = f"eviction {eviction!r}, admission {admission!r} and {put_admission!r}"
            raise ConfigError(f"{found}: choose from {choices}") from error

    def __post_init__(self) -> None:
        if self.stream_nbytes is not None and self.stream_nbytes < 0:
            raise ConfigError(f"stream_nbytes is {self.stream_nbytes}; use None for no limit")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Budgets and thread counts of one open store.

    Args:
        access: reader or writer.
        durability: what an acknowledged write survives; ignored by readers.
        host_nbytes: bytes of the host tier's arena.
        disk_nbytes: most bytes of extent files and catalogue together; None means as much as the disk holds.
        io_threads: native threads that read and write extents.
        decode_threads: threads that encode and decode records.
        host: how the host tier is shared.
        extent_folders: folders on other drives that a writer spreads new extents over, beside the store's own; they
            are remembered, and ignored by readers.

    Raises:
        ConfigError: a size is negative, or a thread count is below one.
    """

    access: Access
    durability: Durability
    host_nbytes: int
    disk_nbytes: int | None = None
    io_threads: int = 4
    decode_threads: int = 2
    host: HostConfig = HostConfig()
    extent_folders: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for name in ("io_threads", "decode_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least one thread is needed")
        if self.host_nbytes < 0:
            raise ConfigError(f"host_nbytes is {self.host_nbytes}; it cannot be negative")
        if self.disk_nbytes is not None and self.disk_nbytes < 0:
            raise ConfigError(f"disk_nbytes is {self.disk_nbytes}; use None for no budget")
