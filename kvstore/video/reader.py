# SPDX-License-Identifier: Apache-2.0
"""The loop of an ingest: observation, tokens, forward, commit."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from kvstore.codec import Profile
from kvstore.engines.anatomy import decoder_of
from kvstore.engines.loading import LanguageModel
from kvstore.engines.tier_cache import TierCache
from kvstore.session.session import Session
from kvstore.store import Store
from kvstore.tiers.manifest import JSON
from kvstore.video.assets import WHISPER_TINY_EN, fetch
from kvstore.video.decode import VideoInfo
from kvstore.video.ocr import ScreenReader
from kvstore.video.perception import Listener, Observation, perceive
from kvstore.video.prompt import cut_into_blocks, stamp
from kvstore.video.speech import Transcriber

_STEP_TOKENS = 64
_FORWARD_TOKENS = 512


@dataclass(frozen=True, slots=True)
class IngestConfig:
    """How a video is read.

    Args:
        fps: frames per second to look at.
        window_tokens: most recent tokens that the model attends to while it reads.
        block_tokens: most tokens of a block.
        profile: how blocks are coded.
        policy: which policy the stream is prepared for; only those that retrieve while they read leave a trace.
        host_nbytes: memory of the host tier.
        device_nbytes: memory of the device pool; the window, the sinks and the blocks being written must fit.
        disk_nbytes: most bytes of the store on disk; None means as much as the disk holds.
    """

    fps: float = 1.0
    window_tokens: int = 512
    block_tokens: int = 128
    profile: Profile = Profile.LOSSLESS
    policy: str = "auto"
    host_nbytes: int = 96 << 20
    device_nbytes: int = 96 << 20
    disk_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """Where an ingest stands; counts are of the whole stream, seconds of this run.

    Args:
        video_s: seconds of video read.
        duration_s: seconds of the whole video.
        resumed_s: where this run began.
        num_frames: frames looked at in this run.
        num_tokens: tokens of the stream.
        new_tokens: tokens read in this run.
        num_blocks: blocks of the stream.
        disk_nbytes: bytes of the store on disk.
        host_nbytes: bytes of blocks in the host tier.
        elapsed_s: seconds since this run began.
        is_complete: whether the end was reached.
    """

    video_s: float
    duration_s: float
    resumed_s: float
    num_frames: int
    num_tokens: int
    new_tokens: int
    num_blocks: int
    disk_nbytes: int
    host_nbytes: int
    elapsed_s: float
    is_complete: bool


class Reader:
    """One run of the loop: observation, tokens, forward, commit."""

    def __init__(
        self,
        store: Store,
        session: Session,
        language_model: LanguageModel,
        info: VideoInfo,
        config: IngestConfig,
        on_progress: Callable[[IngestProgress], None],
    ) -> None:
        self._store = store
        self._session = session
        self._language_model = language_model
        self._decoder = decoder_of(language_model.model)
        self._info = info
        self._config = config
        self._on_progress = on_progress
        cursor = session.view.cursor
        self._resumed_s = float(str(cursor.get("next_s", 0.0)))
        self._group = int(str(cursor.get("next_group", 0)))
        self._first_tokens = session.num_tokens
        self._began = time.perf_counter()

    def read(self, video: Path, cache: TierCache, preamble: list[int]) -> IngestProgress:
        """Read from where the stream ends to the end of the video."""
        if "next_s" not in self._session.view.cursor:
            missing = _chunks(preamble, self._config.block_tokens)[len(self._session.view.entries) :]
            self._append(cache, missing, 0.0, 0.0, -1)
            self._session.commit(self._cursor(0.0, is_complete=False))
        listener: Listener | None = Transcriber(fetch(WHISPER_TINY_EN)) if self._info.has_audio else None
        observations = perceive(video, ScreenReader(), fps=self._config.fps, start_s=self._resumed_s, listener=listener)
        last = self.progress(self._resumed_s)
        with closing(observations):
            for observation in observations:
                self._read_one(cache, observation)
                last = self.progress(observation.end_s)
                self._on_progress(last)
        self._session.commit(self._cursor(self._info.duration_s, is_complete=True))
        self._store.flush()
        last = self.progress(self._info.duration_s)
        self._on_progress(last)
        return last

    def progress(self, video_s: float) -> IngestProgress:
        """The state after `video_s` seconds."""
        stats = self._store.stats()
        session = self._session
        return IngestProgress(
            video_s=video_s,
            duration_s=self._info.duration_s,
            resumed_s=self._resumed_s,
            num_frames=round((video_s - self._resumed_s) * self._config.fps),
            num_tokens=session.num_tokens,
            new_tokens=session.num_tokens - self._first_tokens,
            num_blocks=len(session.view.entries),
            disk_nbytes=stats.usage.extent_used_nbytes + stats.usage.catalogue_nbytes,
            host_nbytes=stats.host_slots_used * session.view.layout.slot_nbytes,
            elapsed_s=time.perf_counter() - self._began,
            is_complete=session.view.cursor.get("is_complete") is True,
        )

    def _read_one(self, cache: TierCache, observation: Observation) -> None:
        if observation.text:
            text = f"\n[{stamp(observation.start_s)}] {observation.text}\n"
            blocks = cut_into_blocks(text, self._language_model.encode, self._config.block_tokens)
            del blocks[: self._num_stored_of_group()]
            self._append(cache, blocks, observation.start_s, observation.end_s, self._group)
        self._group += 1
        self._session.commit(self._cursor(observation.end_s, is_complete=False))

    def _num_stored_of_group(self) -> int:
        """Blocks of the coming group that an interrupted run had stored already: always whole forwards of it."""
        entries = self._session.view.entries
        return sum(1 for _ in itertools.takewhile(lambda entry: entry.group == self._group, reversed(entries)))

    def _append(self, cache: TierCache, blocks: list[list[int]], start_s: float, end_s: float, group: int) -> None:
        """Run the blocks through the model, some at a time, each run filled up to a multiple of `_STEP_TOKENS`.

        oneDNN compiles and keeps kernels for every length it meets: with lengths of all kinds the process grew by
        1.5 MB a screen. The tokens that fill up come last, so no other token attends to them; they vote for nothing,
        and are dropped again.
        """
        for run in _runs(blocks):
            ids = [token for block in run for token in block]
            spare = -len(ids) % _STEP_TOKENS
            for block in run:
                self._session.segment(len(block), start_s, end_s, group)
            padded = torch.tensor([ids + ids[-1:] * spare], device=self._language_model.device)
            self._session.num_spare = spare
            self._decoder(input_ids=padded, past_key_values=cache, use_cache=True)
            if spare:
                self._session.drop(spare)

    def _cursor(self, next_s: float, *, is_complete: bool) -> dict[str, JSON]:
        return {"next_s": next_s, "next_group": self._group, "is_complete": is_complete}


def _runs(blocks: list[list[int]]) -> Iterator[list[list[int]]]:
    """Group blocks into forwards of at most `_FORWARD_TOKENS`; a larger block goes alone."""
    run: list[list[int]] = []
    for block in blocks:
        if run and sum(map(len, run)) + len(block) > _FORWARD_TOKENS:
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _chunks(ids: list[int], size: int) -> list[list[int]]:
    return [ids[first : first + size] for first in range(0, len(ids), size)]
