# SPDX-License-Identifier: Apache-2.0
"""Everything that moves blocks of one layout: host tier, codec, threads, fetcher, and for a writer the way to disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from kvstore.codec import Profile
from kvstore.config import Admission
from kvstore.errors import ConfigError, SpecMismatchError
from kvstore.layout import BlockLayout
from kvstore.native import IoPool
from kvstore.tiers.codec_shelf import CodecShelf
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.manifest import StreamHeader, check_spec
from kvstore.tiers.moving.backing import Backing
from kvstore.tiers.moving.mover import Mover
from kvstore.tiers.moving.prefetcher import Prefetcher
from kvstore.tiers.moving.trial import Trial
from kvstore.tiers.reading.fetcher import Fetcher
from kvstore.tiers.writing.appender import Appender
from kvstore.tiers.writing.calibrator import Calibrator
from kvstore.tiers.writing.committer import Committer
from kvstore.tiers.writing.object_writer import ObjectWriter
from kvstore.tiers.writing.record_writer import RecordWriter
from kvstore.tiers.writing.writer import Writer


class WritePath:
    """The writer's half: what `append` and `put` go through."""

    def __init__(self, records: RecordWriter, writer: Writer, appender: Appender) -> None:
        self.records = records
        self.writer = writer
        self.appender = appender


class DataPath:
    """Owns memory and threads; `close` writes what is queued first.

    Args:
        disk: the disk tier.
        pool: moves extents.
        layout: layout of all slots.
        profile: how new blocks are coded.
        backing: what stands behind the disk.

    Raises:
        ConfigError: the host budget is too small for this layout, or `backing` is of another one.
    """

    def __init__(
        self, disk: DiskTier, pool: IoPool, layout: BlockLayout, profile: Profile, backing: Backing | None = None
    ) -> None:
        if backing is not None:
            if backing.layout != layout:
                raise ConfigError("the remote tier holds blocks of another layout than the store; open both for one")
            backing.use_calibrations(disk.calibrations)
        self.layout = layout
        self.profile = profile
        self.backing = backing
        codecs = CodecShelf(disk.calibrations, layout, profile)
        self._cleanup = ExitStack()
        with ExitStack() as building:
            self.host = HostTier(layout, disk.config.host_nbytes, disk.config.host)
            building.callback(self.host.close)
            coders = ThreadPoolExecutor(disk.config.decode_threads, thread_name_prefix="kvstore-codec")
            building.callback(coders.shutdown)
            self.fetcher = Fetcher(disk, self.host, codecs, layout, pool, coders, backing)
            building.callback(self.fetcher.close)
            self.write: WritePath | None = None
            if disk.is_writable:
                encoders = (coders, disk.config.decode_threads)
                records = RecordWriter(disk, codecs, layout.block_tokens, pool, *encoders, backing)
                building.callback(records.close)
                calibrator = Calibrator(disk.calibrations, layout, profile)
                objects = ObjectWriter(disk, pool)
                committer = Committer(disk, records, calibrator, self.fetcher.damaged, objects)
                writer = Writer(disk, self.host, committer)
                building.callback(writer.close)
                self.write = WritePath(records, writer, Appender(disk, self.host, writer, layout))
            writing = None if self.write is None else self.write.writer
            self.trial: Trial | None = None
            if writing is not None and disk.config.host.put_admission is Admission.SECOND_USE:
                self.trial = Trial(self.host, writing)
                self.fetcher.on_host_hits = self.trial.passed
            self.mover = Mover(self.host, self.fetcher, writing, self.trial, layout.slot_nbytes)
            building.callback(self.mover.close)
            self.prefetcher = Prefetcher(self.host, self.fetcher, layout.slot_nbytes)
            building.callback(self.prefetcher.close)
            self._cleanup = building.pop_all()

    def check_header(self, header: StreamHeader) -> None:
        """Refuse a stream whose blocks this path cannot move.

        Raises:
            SpecMismatchError: another model or block size.
            ConfigError: another profile.
        """
        check_spec(header, self.layout.spec)
        if header.block_tokens != self.layout.block_tokens:
            raise SpecMismatchError(
                f"stream {header.name!r} has blocks of {header.block_tokens} tokens, "
                f"the store was opened for {self.layout.block_tokens}"
            )
        if header.profile is not self.profile:
            raise ConfigError(
                f"stream {header.name!r} is coded as {header.profile}, the store was opened for {self.profile}"
            )

    def close(self) -> None:
        """Write what is queued, end the threads, free the memory; raises what the last writes hit."""
        self._cleanup.close()
