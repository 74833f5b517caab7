# SPDX-License-Identifier: Apache-2.0
"""Ingests a video: perceives it, lets the model read what was perceived, stores the KV blocks with their time spans."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kvstore.engines.anatomy import linear_layers, position_rows, rotation_of, spec_of
from kvstore.engines.loading import LanguageModel
from kvstore.engines.pictures import PictureMaker
from kvstore.engines.transformers import attach
from kvstore.errors import ConfigError, StreamNotFoundError
from kvstore.layout import BlockLayout
from kvstore.retrieval.registry import policy_named
from kvstore.session.session import Session
from kvstore.session.view import SessionConfig
from kvstore.store import Access, Durability, Manifest, Store, StreamHeader, check_spec
from kvstore.tiers.manifest import JSON
from kvstore.video.assets import WHISPER_TINY_EN, fetch
from kvstore.video.decode import VideoInfo, probe
from kvstore.video.ocr import ScreenReader
from kvstore.video.reader import Reader, before_picture
from kvstore.video.senses import PictureTaker, prompts_of
from kvstore.video.settings import IngestConfig, IngestProgress
from kvstore.video.speech import Transcriber, name_of
from kvstore.watch.live import publish

__all__ = ["IngestConfig", "IngestProgress", "ingest"]


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
        language_model: what reads the video's text, or sees its frames if it has a vision tower.
        config: see `IngestConfig`.
        on_progress: called after every observation, and after every step of a calibration; what it raises stops both.

    Raises:
        MediaError: not a readable video.
        ConfigError: the stream exists with another video or other settings, a frame does not fit the window, or the
            model has linear layers.
        CorruptRecordError: the stream's cursor or its last blocks cannot be read.
        SpecMismatchError: the stream exists with another model.
        CapacityError: the disk or the budget is full; what is stored can be asked, and resumed when there is room.
        ReadOnlyError: the folder cannot be written.
        BusyError: another process writes this store.
    """
    if linear_layers(language_model.model):
        raise ConfigError(
            f"{type(language_model.model).__name__} has linear layers, whose states an ingest does not save with every "
            "checkpoint; use a model that attends in all layers"
        )
    info = probe(video)
    spec = spec_of(language_model.model)
    preamble = language_model.encode(prompts_of(language_model).preamble)
    eyes = _eyes(language_model, info, config)
    session_config = SessionConfig(
        policy=policy_named(config.policy),
        window_tokens=config.window_tokens,
        sink_tokens=len(preamble),
        device_nbytes=config.device_nbytes,
    )
    layout = BlockLayout(spec, config.block_tokens)
    with (
        Store.open(
            store_folder,
            access=Access.WRITE,
            layout=layout,
            profile=config.profile,
            host_nbytes=config.host_nbytes,
            disk_nbytes=config.disk_nbytes,
            durability=Durability.COMMIT,
        ) as store,
        publish(store, store_folder, f"ingest {name}"),
    ):
        header = StreamHeader(
            name=name,
            spec=spec,
            block_tokens=config.block_tokens,
            profile=config.profile,
            prefill=session_config.prefill,
            source=_source(video, info, config, eyes),
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
        reader = Reader(store, session, language_model, eyes, info, config, on_progress)
        if manifest.is_complete:
            return reader.progress(info.duration_s)
        with attach(language_model.model, session) as attached, torch.inference_mode():
            listener = Transcriber(fetch(WHISPER_TINY_EN)) if info.has_audio else None
            return reader.read(video, attached.cache(), preamble, listener)


def _eyes(language_model: LanguageModel, info: VideoInfo, config: IngestConfig) -> ScreenReader | PictureTaker:
    """What looks at the frames; a picture that the model will not see whole is refused before anything is stored."""
    if language_model.image_processor is None:
        return ScreenReader()
    num_before = len(language_model.encode(before_picture(info.duration_s)))
    maker = PictureMaker(
        language_model.model,
        language_model.image_processor,
        language_model.encode,
        most_tokens=config.block_tokens - num_before,
    )
    num_tokens = num_before + len(maker.picture(np.zeros((info.height, info.width, 3), dtype=np.uint8)).ids)
    if num_tokens > config.window_tokens:
        raise ConfigError(
            f"a frame makes {num_tokens} tokens and the window holds {config.window_tokens}; "
            f"set window_tokens to {num_tokens} or more"
        )
    return PictureTaker(maker)


def _source(video: Path, info: VideoInfo, config: IngestConfig, eyes: ScreenReader | PictureTaker) -> dict[str, JSON]:
    return {
        "file": video.name,
        "content_id": info.content_id,
        "duration_s": info.duration_s,
        "fps": config.fps,
        "frames": eyes.name,
        "speech": name_of(WHISPER_TINY_EN) if info.has_audio else None,
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
        ("reader of frames", found.source.get("frames"), wanted.source["frames"]),
        ("writer of speech", found.source.get("speech"), wanted.source["speech"]),
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
