# SPDX-License-Identifier: Apache-2.0
"""Frames: units that begin and end where a frame does, or a scene of like frames."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from kvstore.errors import ConfigError
from kvstore.retrieval.tokens import LayerTokens
from kvstore.retrieval.units import Units


@dataclass(frozen=True, slots=True)
class Frames:
    """Every frame is one unit, whatever its size; text between frames is cut to pages.

    A frame ends where another one or text follows, so the last one waits for that.

    Source: ReKV (arXiv:2503.00540), whose frames are all of one size.

    Args:
        page_tokens: of text; the last page before a frame may be shorter.

    Raises:
        ConfigError: `page_tokens` is not positive.
    """

    page_tokens: int = 128

    def __post_init__(self) -> None:
        _check_pages(self.page_tokens)

    def cut(self, tokens: LayerTokens, *, is_end: bool) -> Sequence[Units]:
        """See `Segmenter`."""
        sizes: list[int] = []
        runs = _runs(tokens)
        for start, end in pairwise(runs):
            is_open = end == runs[-1] and not is_end
            if tokens.groups[start] < 0:
                sizes += _pages(end - start, self.page_tokens, is_open=is_open)
            elif not is_open:
                sizes.append(end - start)
        return [Units.runs(tokens.first, sizes)]


@dataclass(frozen=True, slots=True)
class Scenes:
    """Frames are one unit until the next one differs; text between frames is cut to pages.

    A scene ends before a frame whose mean key has a cosine below `threshold` with that of the frame before, unless the
    scene has fewer than `least_frames`; and at `most_frames` in any case.

    Source: StreamKV (arXiv:2511.07278), which compares what the vision tower says of frames. Ours compares the means of
    their keys before RoPE, all KV heads together, because no pixels reach us; the threshold is another one, then.

    Args:
        threshold: cosine below which two frames are of different scenes.
        least_frames: of a scene, unless text or the end cuts it short.
        most_frames: of a scene.
        page_tokens: of text; the last page before a frame may be shorter.

    Raises:
        ConfigError: a figure is not positive, or `least_frames` is larger than `most_frames`.
    """

    threshold: float = 0.99
    least_frames: int = 4
    most_frames: int = 64
    page_tokens: int = 128

    def __post_init__(self) -> None:
        _check_pages(self.page_tokens)
        if not 1 <= self.least_frames <= self.most_frames:
            raise ConfigError(f"scenes of {self.least_frames} to {self.most_frames} frames; use 1 to any larger number")

    def cut(self, tokens: LayerTokens, *, is_end: bool) -> Sequence[Units]:
        """See `Segmenter`.

        Raises:
            ConfigError: keys are stored rotated.
        """
        sizes: list[int] = []
        runs = _runs(tokens)
        is_text = [bool(tokens.groups[start] < 0) for start in runs[:-1]]
        breaks = self._breaks(tokens, runs)
        number = 0
        while number < len(is_text):
            if is_text[number]:
                is_open = number + 1 == len(is_text) and not is_end
                sizes += _pages(runs[number + 1] - runs[number], self.page_tokens, is_open=is_open)
                number += 1
                continue
            behind = is_text.index(True, number) if True in is_text[number:] else len(is_text)
            is_open = behind == len(is_text) and not is_end
            # Of the last frame not all may be there.
            ends = list(self._ends(number, behind - is_open, breaks))
            if not is_open and behind not in ends:
                ends.append(behind)
            sizes += [runs[end] - runs[start] for start, end in pairwise([number, *ends])]
            number = behind
        return [Units.runs(tokens.first, sizes)]

    def _breaks(self, tokens: LayerTokens, runs: Sequence[int]) -> list[int]:
        """Runs that differ from the one before."""
        means = [tokens.plain[:, start:end].mean(dim=1).flatten() for start, end in pairwise(runs)]
        if len(means) < 2:
            return []
        rows = torch.nn.functional.normalize(torch.stack(means), dim=1)
        differ: list[int] = ((rows[1:] * rows[:-1]).sum(dim=1) < self.threshold).nonzero()[:, 0].tolist()
        return [number + 1 for number in differ]

    def _ends(self, start: int, whole: int, breaks: Sequence[int]) -> Iterator[int]:
        """Where the scenes of the frames `start` to `whole` end, as far as frames to come cannot change that."""
        while True:
            place = bisect_left(breaks, start + self.least_frames)
            differs = breaks[place] if place < len(breaks) and breaks[place] < whole else whole + 1
            start = min(differs, start + self.most_frames)
            if start > whole:
                return
            yield start


def _check_pages(page_tokens: int) -> None:
    if page_tokens < 1:
        raise ConfigError(f"pages of {page_tokens} tokens; they must hold at least one")


def _runs(tokens: LayerTokens) -> list[int]:
    """Where runs of tokens of one frame, or of none, begin; and the end."""
    changes: list[int] = (tokens.groups.diff() != 0).nonzero()[:, 0].tolist()
    return [0, *(place + 1 for place in changes), tokens.num_tokens] if tokens.num_tokens else [0]


def _pages(num_tokens: int, page_tokens: int, *, is_open: bool) -> list[int]:
    whole, rest = divmod(num_tokens, page_tokens)
    return [page_tokens] * whole + [rest] * (rest > 0 and not is_open)
