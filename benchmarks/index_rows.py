# SPDX-License-Identifier: Apache-2.0
"""Rows and queries to search: summaries of a real model's keys with its own queries, or worst-case noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kvstore.engines.anatomy import decoder_of, rotation_of, spec_of
from kvstore.retrieval.policies.quest import POLICY as QUEST
from kvstore.retrieval.summarisers.bounds import MinMax
from kvstore.retrieval.tokens import LayerQuery, LayerTokens
from kvstore.retrieval.units import Units
from kvstore.video.model import load
from real_kv import text_ids

CHUNK_TOKENS = 1024
PAGE_TOKENS = 16
PAGE_STEP = 2
"""Pages of `PAGE_TOKENS` begin at every second token, so that few tokens make many different summaries."""
NUM_QUERIES = 64
JITTER = 0.5
"""Noise of copies, over the deviation of each channel: a copy is as far from its original as from its neighbours."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What is searched, and what asks.

    Args:
        rows: [partitions, num_rows, width] float32.
        queries: [partitions, num_queries, width] float32.
        origin: where they come from, for the report.
    """

    rows: Tensor
    queries: Tensor
    origin: str

    def grown(self, num_rows: int, partitions: int) -> Sample:
        """This many rows in this many partitions: the rows there are, then noisy copies of them."""
        generator = torch.Generator().manual_seed(0)
        of = torch.arange(partitions) % self.rows.shape[0]
        spread = JITTER * self.rows.std(dim=1)[of, None]
        found = torch.empty(partitions, num_rows, self.rows.shape[2])
        for first in range(0, num_rows, self.rows.shape[1]):
            part = found[:, first : first + self.rows.shape[1]]
            part.copy_(self.rows[of, : part.shape[1]])
            if first or partitions > self.rows.shape[0]:
                part += spread * torch.randn(part.shape, generator=generator)
        return Sample(found, self.queries[of], self.origin)


def gaussian(partitions: int, num_rows: int, width: int) -> Sample:
    """Rows and queries without any structure: no index can leave anything out without a loss."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(partitions, num_rows, width, generator=generator)
    return Sample(rows, torch.randn(partitions, NUM_QUERIES, width, generator=generator), "noise")


def of_model(path: Path | None, num_tokens: int) -> list[Sample]:
    """Summaries of a middle layer of a model that reads Python's sources, and lifted queries of the text's later part.

    Two kinds: `[max | min]` of pages of rotated keys, as Quest has them, and means of pages of keys before RoPE.
    """
    language_model = load(path)
    model = language_model.model
    spec = spec_of(model)
    decoder = decoder_of(model)
    attention = decoder.get_submodule(f"layers.{spec.num_layers // 2}.self_attn")
    keys: list[Tensor] = []
    queries: list[Tensor] = []
    handles = [_kept(attention.get_submodule(name), into) for name, into in (("k_proj", keys), ("q_proj", queries))]
    ids = text_ids(language_model, num_tokens)
    with torch.inference_mode():
        for first in range(0, num_tokens, CHUNK_TOKENS):
            decoder(input_ids=torch.tensor([ids[first : first + CHUNK_TOKENS]], device=language_model.device))
    for handle in handles:
        handle.remove()
    key = torch.cat(keys, dim=1)[0].float().cpu().unflatten(1, (-1, spec.key_dim)).transpose(0, 1)
    query = torch.cat(queries, dim=1)[0].float().cpu().unflatten(1, (spec.kv_heads, -1, spec.key_dim))
    # Between chunks the model starts anew, but keys are rotated as in one stream.
    positions = torch.arange(num_tokens)[None]
    none = torch.zeros(spec.kv_heads, num_tokens)
    rotate = rotation_of(model)
    tokens = LayerTokens(0, key, key, positions, none, none[0].long(), rotate)
    starts = torch.arange(0, num_tokens - PAGE_TOKENS, PAGE_STEP)
    places = (starts[:, None] + torch.arange(PAGE_TOKENS)).flatten()
    pages = Units(places, torch.arange(0, len(places) + 1, PAGE_TOKENS))
    asking = torch.randperm(num_tokens // 2, generator=torch.Generator().manual_seed(0))[:NUM_QUERIES] + num_tokens // 2
    asked = LayerQuery(query[asking].permute(1, 2, 0, 3), positions[:, asking], rotate)
    heads = slice(0, spec.kv_heads)
    bounds = MinMax().summarise(tokens.rotated[:, places], tokens, pages, heads)
    view = QUEST.views[0]
    lifted = view.scorer.lift(asked.in_space(view.space, slice(None))).sum(dim=1)
    plain = key[:, places].unflatten(1, (-1, PAGE_TOKENS)).mean(dim=2)
    origin = f"keys of {language_model.path.stem}"
    return [
        Sample(bounds, lifted, f"{origin}, bounds of pages"),
        Sample(plain, query[asking].permute(1, 2, 0, 3).sum(dim=1), f"{origin}, means of pages"),
    ]


def _kept(module: nn.Module, into: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_hook(lambda _, __, output: into.append(output.detach().clone()))
