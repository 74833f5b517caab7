# SPDX-License-Identifier: Apache-2.0
"""A made-up stream of any length: words by Zipf's law, topics that drift, and now and then a run of rare words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.spec import ModelSpec

BLOCK_TOKENS = 128
CHUNK_TOKENS = 512
SPEC = ModelSpec(2, 2, 64, 64, "bfloat16", "pre", "made", '{"theta":10000}', "0")
RUN_TOKENS = 12
"""Tokens of a planted run, and half of those of the question that asks for it."""
SPACING_TOKENS = 8192
"""Of as many tokens, one run is planted."""

_NUM_WORDS = 8192
_NUM_SHARED = 64
_NUM_RARE = 4096
_NUM_TOPICS = 256
_TOPIC_TOKENS = 2048
_TOPIC_SHARE = 0.4
_BEFORE_SHARE = 0.8
_NOISE = 0.3
_NOISE_ROWS = 1 << 14
_WIDTH = (SPEC.kv_heads, SPEC.key_dim)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one forward: ids `[num]`, positions `[1, 1, num]`, and by layer `[1, heads, num, dim]`."""

    ids: Tensor
    positions: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Needle:
    """A planted run: where it begins, and its words `[RUN_TOKENS]`."""

    first_token: int
    words: Tensor


def rotate(vectors: Tensor, positions: Tensor) -> Tensor:
    """RoPE with base 10,000: vectors `[batch, heads, tokens, dim]`, positions `[1, batch, tokens]`."""
    half = SPEC.key_dim // 2
    angles = positions[0].float()[:, None, :, None] * 10000.0 ** (-torch.arange(half) / half)
    left, right = vectors.float().chunk(2, dim=-1)
    turned = [left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()]
    return torch.cat(turned, dim=-1).to(vectors.dtype)


class MadeStream:
    """Every token follows from its number alone, so that a stream can be written in several runs.

    As in a model, a key of the first layer says its word, and one of the second also the word before it and the topic,
    which changes every 2,048 tokens; both are noisy and lie around a common mean. Words follow Zipf's law. Planted are
    runs of words from the rare half, which stand elsewhere too, in other company. Values say the word, and compress
    well: nothing looks at them.
    """

    def __init__(self) -> None:
        chance = torch.Generator().manual_seed(1)
        self._words = torch.randn(_NUM_WORDS, *_WIDTH, generator=chance)
        self._deep_words = torch.randn(_NUM_WORDS, *_WIDTH, generator=chance)
        self._before = _BEFORE_SHARE * torch.randn(_NUM_WORDS, *_WIDTH, generator=chance)
        self._topics = _TOPIC_SHARE * torch.randn(_NUM_TOPICS, *_WIDTH, generator=chance)
        self._mean = torch.randn(2, 1, *_WIDTH, generator=chance)
        self._noise = _NOISE * torch.randn(_NOISE_ROWS, *_WIDTH, generator=chance)
        self._says = torch.randn(_NUM_WORDS, *_WIDTH, generator=chance).bfloat16()

    def needle(self, number: int) -> Needle:
        """The planted run among tokens `number * SPACING_TOKENS` and following."""
        chance = torch.Generator().manual_seed(1_000_003 + number)
        block = int(torch.randint(SPACING_TOKENS // BLOCK_TOKENS, (), generator=chance))
        row = int(torch.randint(1, BLOCK_TOKENS - RUN_TOKENS, (), generator=chance))
        words = torch.randint(_NUM_WORDS - _NUM_RARE, _NUM_WORDS, (RUN_TOKENS,), generator=chance)
        return Needle(number * SPACING_TOKENS + block * BLOCK_TOKENS + row, words)

    def chunk(self, first: int) -> Chunk:
        """`CHUNK_TOKENS` tokens from number `first`, a multiple of as many, on."""
        chance = torch.Generator().manual_seed(first)
        topic = int(torch.randint(_NUM_TOPICS, (), generator=torch.Generator().manual_seed(7 + first // _TOPIC_TOKENS)))
        words = self._draw(CHUNK_TOKENS, topic, chance)
        needle = self.needle(first // SPACING_TOKENS)
        at = needle.first_token - first
        if 0 <= at < CHUNK_TOKENS:
            words[at : at + RUN_TOKENS] = needle.words
        return self._spoken(words, first, self._topics[topic], chance)

    def question(self, number: int) -> Chunk:
        """Words that are everywhere and those of one planted run, of no topic; positions count from 0."""
        chance = torch.Generator().manual_seed(2_000_003 + number)
        words = torch.cat([self._draw(RUN_TOKENS, number % _NUM_TOPICS, chance), self.needle(number).words])
        return self._spoken(words, 0, torch.zeros(_WIDTH), chance)

    def _draw(self, count: int, topic: int, chance: torch.Generator) -> Tensor:
        """Word numbers: small ranks are words of all topics, the others are the topic's own choice."""
        ranks = (_NUM_WORDS ** torch.rand(count, generator=chance)).long() - 1
        return torch.where(ranks < _NUM_SHARED, ranks, (ranks * 31 + topic * 1009) % _NUM_WORDS)

    def _spoken(self, words: Tensor, first: int, topic: Tensor, chance: torch.Generator) -> Chunk:
        num = words.shape[0]
        start = torch.randint(_NOISE_ROWS - num, (2,), generator=chance).tolist()
        deep = self._deep_words[words] + self._before[words.roll(1)] + topic
        made = torch.stack([self._words[words], deep]) + self._mean
        keys = made + torch.stack([self._noise[at : at + num] for at in start])
        by_layer = keys.bfloat16().transpose(1, 2)[:, None]
        values = self._says[words].transpose(0, 1)[None, None].expand(2, -1, -1, -1, -1)
        return Chunk(words, torch.arange(first, first + num)[None, None], by_layer, by_layer, values)
