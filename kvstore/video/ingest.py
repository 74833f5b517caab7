# SPDX-License-Identifier: Apache-2.0
"""Ingests a video: perceives it, lets the model read what was perceived, stores the KV blocks with their time spans."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from kvstore.codec import Profile
from kvstore.engines.anatomy import decoder_of, position_rows, rotation_of, spec_of
from kvstore.engines.loading import LanguageModel
from kvstore.engines.transformers import Attached, attach
from kvstore.errors import ConfigError, StreamNotFoundError
from kvstore.layout import BlockLayout
from kvstore.retrieval.policies import policy_named
from kvstore.session.session import Session
from kvstore.session.view import SessionConfig
from kvstore.store import Access, Durability, Manifest, Store, StreamHeader, check_spec
from kvstore.tiers.manifest import JSON
from kvstore.video.assets import WHISPER_TINY_EN, fetch
from kvstore.video.decode import VideoInfo, probe
from kvstore.video.ocr import ScreenReader
from kvstore.video.perception import Listener, Observation, perceive
from kvstore.video.prompt import PREAMBLE, cut_into_blocks, stamp
from kvstore.video.speech import Transcriber


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
        disk_nbytes: most bytes of the store on disk; None means as much as the disk holds.
    """

    fps: float = 1.0
    window_tokens: int = 512
    block_tokens: int = 128
    profile: Profile = Profile.LOSSLESS
    policy: str = "auto"
    host_nbytes: int = 256 << 20
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


def ingest(
    video: Path,
    store_folder: Path,
    name: str,
    language_model: LanguageModel,
    config: IngestConfig,
    on_progress: Callable[[IngestProgress], None],
) -> IngestProgress:
    """Read a video into a stream, or go on where an earlier run was interrupted.

    Args:
        video: the file.
        store_folder: the store; made if it is not there.
        name: the stream.
        language_model: what reads.
        config: see `IngestConfig`.
        on_progress: called after every observation.

    Raises:
        MediaError: not a readable video.
        ConfigError: the stream exists with another video or other settings.
        SpecMismatchError: the stream exists with another model.
        CapacityError: the disk or the budget is full; what is stored can be asked, and resumed when there is room.
        ReadOnlyError: the folder cannot be written.
        BusyError: another process writes this store.
    """
    info = probe(video)
    spec = spec_of(language_model.model)
    preamble = language_model.encode(PREAMBLE)
    session_config = SessionConfig(
        policy=policy_named(config.policy), window_tokens=config.window_tokens, sink_tokens=len(preamble)
    )
    layout = BlockLayout(spec, config.block_tokens)
    with Store.open(
        store_folder,
        access=Access.WRITE,
        layout=layout,
        profile=config.profile,
        host_nbytes=config.host_nbytes,
        disk_nbytes=config.disk_nbytes,
        durability=Durability.COMMIT,
    ) as store:
        header = StreamHeader(
            name=name,
            spec=spec,
            block_tokens=config.block_tokens,
            profile=config.profile,
            prefill=session_config.prefill,
            source=_source(video, info, config),
            created_unix_s=time.time(),
        )
        manifest = _existing(store, header)
        if manifest is None:
            manifest = store.create_stream(header)
        session = Session(
            store,
            manifest.header,
            session_config,
            rotation_of(language_model.model),
            language_model.device,
            position_rows(language_model.model),
        )
        reader = _Reader(store, session, language_model, info, config, on_progress)
        if manifest.is_complete:
            return reader.progress(info.duration_s)
        with attach(language_model.model, session) as attached, torch.inference_mode():
            return reader.read(video, attached, preamble)


class _Reader:
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
        self._info = info
        self._config = config
        self._on_progress = on_progress
        cursor = session.view.cursor
        self._resumed_s = float(str(cursor.get("next_s", 0.0)))
        self._group = int(str(cursor.get("next_group", 0)))
        self._first_tokens = session.num_tokens
        self._began = time.perf_counter()

    def read(self, video: Path, attached: Attached, preamble: list[int]) -> IngestProgress:
        """Read from where the stream ends to the end of the video."""
        if self._session.num_tokens == 0:
            self._append(attached, _chunks(preamble, self._config.block_tokens), 0.0, 0.0, -1)
            self._session.commit(self._cursor(0.0, is_complete=False))
        listener: Listener | None = Transcriber(fetch(WHISPER_TINY_EN)) if self._info.has_audio else None
        observations = perceive(video, ScreenReader(), fps=self._config.fps, start_s=self._resumed_s, listener=listener)
        last = self.progress(self._resumed_s)
        with closing(observations):
            for observation in observations:
                self._read_one(attached, observation)
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

    def _read_one(self, attached: Attached, observation: Observation) -> None:
        if observation.text:
            text = f"\n[{stamp(observation.start_s)}] {observation.text}\n"
            blocks = cut_into_blocks(text, self._language_model.encode, self._config.block_tokens)
            self._append(attached, blocks, observation.start_s, observation.end_s, self._group)
        self._group += 1
        self._session.commit(self._cursor(observation.end_s, is_complete=False))

    def _append(self, attached: Attached, blocks: list[list[int]], start_s: float, end_s: float, group: int) -> None:
        for block in blocks:
            self._session.segment(len(block), start_s, end_s, group)
        ids = torch.tensor([[token for block in blocks for token in block]], device=self._language_model.device)
        decoder_of(self._language_model.model)(input_ids=ids, past_key_values=attached.cache(), use_cache=True)

    def _cursor(self, next_s: float, *, is_complete: bool) -> dict[str, JSON]:
        return {"next_s": next_s, "next_group": self._group, "is_complete": is_complete}


def _chunks(ids: list[int], size: int) -> list[list[int]]:
    return [ids[first : first + size] for first in range(0, len(ids), size)]


def _source(video: Path, info: VideoInfo, config: IngestConfig) -> dict[str, JSON]:
    return {
        "file": video.name,
        "content_id": info.content_id,
        "duration_s": info.duration_s,
        "fps": config.fps,
    }


def _existing(store: Store, wanted: StreamHeader) -> Manifest | None:
    """The stream to go on with, if there is one, after checking that it is the same work."""
    try:
        manifest = store.manifest(wanted.name)
    except StreamNotFoundError:
        return None
    found = manifest.header
    check_spec(found, wanted.spec)
    for label, had, has in (
        ("video", found.source.get("content_id"), wanted.source["content_id"]),
        ("fps", found.source.get("fps"), wanted.source["fps"]),
        ("block size", found.block_tokens, wanted.block_tokens),
        ("profile", found.profile, wanted.profile),
        ("prefill", found.prefill, wanted.prefill),
    ):
        if had != has:
            raise ConfigError(
                f"stream {wanted.name!r} exists with another {label} ({had}, not {has}); "
                "choose another name, or remove it with: kvstore rm"
            )
    return manifest
