# SPDX-License-Identifier: Apache-2.0
"""The loop of an ingest: observation, tokens, forward, commit."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from kvstore.engines.anatomy import decoder_of
from kvstore.engines.first_words import FirstWords
from kvstore.engines.loading import LanguageModel
from kvstore.engines.pictures import Picture
from kvstore.engines.tier_cache import TierCache
from kvstore.errors import CorruptRecordError
from kvstore.session.session import Session
from kvstore.store import Store
from kvstore.tiers.manifest import JSON
from kvstore.video.decode import VideoInfo
from kvstore.video.ocr import ScreenReader
from kvstore.video.perception import Listener, Observation, perceive
from kvstore.video.prompt import cut_into_blocks, stamp, words_of
from kvstore.video.senses import PictureTaker
from kvstore.video.settings import IngestConfig, IngestProgress

_STEP_TOKENS = 64
_FORWARD_TOKENS = 512
_FAR = 1 << 40
"""No second of a video, and no number of a group, is as large."""


class Reader:
    """One run of the loop: observation, tokens, forward, commit.

    Raises:
        CorruptRecordError: the stream's cursor does not say where to go on.
    """

    def __init__(
        self,
        store: Store,
        session: Session,
        language_model: LanguageModel,
        eyes: ScreenReader | PictureTaker,
        info: VideoInfo,
        config: IngestConfig,
        on_progress: Callable[[IngestProgress], None],
    ) -> None:
        self._store = store
        self._session = session
        self._language_model = language_model
        self._decoder = decoder_of(language_model.model)
        self._eyes = eyes
        self._info = info
        self._config = config
        self._on_progress = on_progress
        self._first_words = FirstWords(
            store, language_model, session.view.layout, config.profile, self._while_calibrating
        )
        self._resumed_s, self._group = _resume_point(session.view.header.name, session.view.cursor)
        self._read_s = self._resumed_s
        self._first_tokens = session.num_tokens
        self._began = time.perf_counter()

    def read(self, video: Path, cache: TierCache, preamble: list[int], listener: Listener | None) -> IngestProgress:
        """Read from where the stream ends to the end of the video."""
        if "next_s" not in self._session.view.cursor:
            missing = _chunks(preamble, self._config.block_tokens)[len(self._session.view.entries) :]
            self._append(cache, missing, 0.0, 0.0, -1)
            self._session.commit(self._cursor(0.0, is_complete=False))
        observations = perceive(video, self._eyes, fps=self._config.fps, start_s=self._resumed_s, listener=listener)
        last = self.progress(self._resumed_s)
        with closing(observations):
            for observation in observations:
                self._read_one(cache, observation)
                self._read_s = observation.end_s
                last = self.progress(self._read_s)
                self._on_progress(last)
        self._session.commit(self._cursor(self._info.duration_s, is_complete=True), partial=True)
        self._session.flush()
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

    def _while_calibrating(self, share: float) -> None:
        self._on_progress(replace(self.progress(self._read_s), calibrated=share))

    def _read_one(self, cache: TierCache, observation: Observation) -> None:
        start_s, end_s, text = observation.start_s, observation.end_s, observation.text
        num_stored = self._num_stored_of_group()
        if observation.picture is not None:
            before = self._language_model.encode(before_picture(start_s))
            sizes = _even(len(before) + len(observation.picture.ids), self._config.block_tokens)
            if num_stored == 0:
                for size in sizes:
                    self._session.segment(size, start_s, end_s, self._group)
                self._look(cache, before, observation.picture)
            num_stored = max(num_stored - len(sizes), 0)
            text = text and f"\n{text}\n"
        elif text:
            text = words_of(start_s, text)
        blocks = cut_into_blocks(text, self._language_model.encode, self._config.block_tokens)
        self._append(cache, blocks[num_stored:], start_s, end_s, self._group)
        self._group += 1
        self._session.commit(self._cursor(end_s, is_complete=False))

    def _look(self, cache: TierCache, before: list[int], picture: Picture) -> None:
        """Run a picture and the words before it through the model, in one forward: its blocks are stored together."""
        assert isinstance(self._eyes, PictureTaker), "only those make pictures"
        arguments = self._eyes.maker.arguments(before, picture, self._session.view.end_position)
        self._language_model.model(**arguments, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _num_stored_of_group(self) -> int:
        """Blocks of the coming group that an interrupted run had stored already: always whole forwards of it."""
        entries = self._session.view.entries
        return sum(1 for _ in itertools.takewhile(lambda entry: entry.group == self._group, reversed(entries)))

    def _append(self, cache: TierCache, blocks: list[list[int]], start_s: float, end_s: float, group: int) -> None:
        """Run the blocks through the model, some at a time, each run filled up to a multiple of `_STEP_TOKENS`.

        oneDNN compiles and keeps kernels for every length it meets: with lengths of all kinds the process grew by
        1.5 MB a screen. The tokens that fill up come last, so no other token attends to them; they vote for nothing,
        and the session drops them.
        """
        for run in _runs(blocks):
            ids = [token for block in run for token in block]
            spare = -len(ids) % _STEP_TOKENS
            for block in run:
                self._session.segment(len(block), start_s, end_s, group)
            padded = torch.tensor([ids + ids[-1:] * spare], device=self._language_model.device)
            self._session.num_spare = spare
            where = self._positions(padded.shape[1])
            self._decoder(input_ids=padded, position_ids=where, past_key_values=cache, use_cache=True)
            self._first_words.read(ids)

    def _positions(self, num_tokens: int) -> torch.Tensor | None:
        """M-RoPE positions of coming words, which the decoder would count wrong behind a picture; else it counts."""
        view = self._session.view
        if view.rows == 1:
            return None
        first = view.end_position
        return torch.arange(first, first + num_tokens, device=self._language_model.device).expand(view.rows, 1, -1)

    def _cursor(self, next_s: float, *, is_complete: bool) -> dict[str, JSON]:
        return {"next_s": next_s, "next_group": self._group, "is_complete": is_complete}


def before_picture(start_s: float) -> str:
    """The words before a picture."""
    return f"\n[{stamp(start_s)}] "


def _resume_point(name: str, cursor: Mapping[str, JSON]) -> tuple[float, int]:
    """Second and frame group to go on with."""
    next_s, group = cursor.get("next_s", 0.0), cursor.get("next_group", 0)
    if isinstance(next_s, (int, float)) and isinstance(group, int) and 0 <= next_s < _FAR and 0 <= group < _FAR:
        return float(next_s), group
    raise CorruptRecordError(
        f"stream {name!r}: its cursor (next_s {next_s!r}, next_group {group!r}) does not say where to go on; "
        "choose another name, or remove it with: kvstore rm"
    )


def _even(num_tokens: int, block_tokens: int) -> list[int]:
    """Sizes of as few blocks as hold the tokens, as even as can be."""
    count = -(-num_tokens // block_tokens)
    return [num_tokens * (block + 1) // count - num_tokens * block // count for block in range(count)]


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
