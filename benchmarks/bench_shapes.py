# SPDX-License-Identifier: Apache-2.0
"""A decoded token of large models' shapes, one layer: choosing, attending to what was chosen, and to all; made-up KV.

On the CPU by torch, on a GPU by Triton kernels. Limits are the bytes that must be read over the bandwidth of a copy.
"""

from __future__ import annotations

import argparse
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from harness import Report, Timed, check, options
from kvstore.kernels.dispatch import summarise_rows
from kvstore.kernels.paged_reference import Rotation
from kvstore.retrieval.registry import policy_named
from shapes.clock import Bandwidth, timed
from shapes.layer import BLOCK_TOKENS, Layer, attend_to_all
from shapes.models import SHAPES, Shape
from shapes.scorers import PageScorer

POLICIES = ["quest", "arkvale", "shadowkv", "auto"]
BEYOND_CACHES = {"cpu": 128 << 20, "cuda": 256 << 20}
"""Bytes that calls go through before they meet the same again, as those of a model's layers are."""
MOST_SELECTIONS = 32
READING = "reading its bytes"
IN_PLACE, GATHERED, ALL = "rows where they lie", "gathered, then sdpa", "all of it by sdpa"


def main() -> None:
    """Measure every shape, length and policy that fits the memory."""
    settings = options("shapes", __doc__, add_options)
    device = torch.device(settings.device)
    min_s = 0.03 if settings.quick else 0.3
    lengths = settings.tokens or ([4096] if settings.quick else [1 << 14, 1 << 17, 1 << 20])
    bandwidth = Bandwidth(device, min_s)
    place = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    report = Report(settings, {"device": place, "dtype": "bfloat16", "data": "made"})
    print(f"# a copy moves {bandwidth.nbytes_s / 1e9:.3g} GB/s, read and written")
    for name in settings.models:
        for num_tokens in lengths:
            needed = needed_nbytes(SHAPES[name], num_tokens)
            if needed > free_nbytes(device):
                print(f"# {name} with {num_tokens} tokens is left out: it takes {needed / 2**30:.1f} GiB")
                continue
            measure(report, name, num_tokens, settings, device, bandwidth, min_s)
    report.write()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare what can be varied."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="whose shapes")
    parser.add_argument(
        "--tokens", nargs="+", type=_blocks, help=f"lengths of the context, multiples of {BLOCK_TOKENS}"
    )
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="with pages of one size")
    parser.add_argument("--budget-tokens", type=_blocks, default=1024, help="tokens chosen for each KV head")


def _blocks(text: str) -> int:
    number = int(text)
    if number < BLOCK_TOKENS or number % BLOCK_TOKENS:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {BLOCK_TOKENS}")
    return number


def measure(
    report: Report,
    name: str,
    num_tokens: int,
    settings: argparse.Namespace,
    device: torch.device,
    bandwidth: Bandwidth,
    min_s: float,
) -> None:
    """One shape and length: attention to everything, then policy by policy."""
    shape, chance = SHAPES[name], torch.Generator().manual_seed(0)
    angles = shape.angles(num_tokens)
    cos, sin = angles.cos().bfloat16().to(device), angles.sin().bfloat16().to(device)
    layer = Layer.made(shape, num_tokens, (cos, sin), device, chance)
    query = torch.randn(1, shape.num_heads, 1, shape.dim, generator=chance).bfloat16().to(device)
    case = {"model": name, "tokens": num_tokens}
    block(report, layer, case, bandwidth, min_s)
    everything = attend_to_everything(report, layer, query, case, bandwidth, min_s)
    for policy in settings.policies:
        scorer = PageScorer.of(policy_named(policy), shape)
        budget = min(settings.budget_tokens, num_tokens)
        choose(report, layer, scorer, query, everything, budget, case, bandwidth, min_s)


def attend_to_everything(
    report: Report, layer: Layer, query: Tensor, case: dict[str, object], bandwidth: Bandwidth, min_s: float
) -> Timed:
    """Attention as an engine without a store has it, to keys and values in one piece."""
    keys, values = layer.in_order()
    check_layer(layer, query, keys, values)
    found = timed({ALL: lambda: attend_to_all(query, keys, values)}, keys.device, min_s)[ALL]
    nbytes = layer.num_tokens * layer.shape.kv_heads * layer.row_nbytes
    report.latency("attend to all", (ALL, found), (READING, bandwidth.limit(nbytes)), **case)
    return ALL, found


def block(report: Report, layer: Layer, case: dict[str, object], bandwidth: Bandwidth, min_s: float) -> None:
    """Summaries of a block that has become full, in pages of 16 that lie in one slot."""
    device = layer.keys.device
    pages = torch.arange(BLOCK_TOKENS // 16, device=device)[None]
    rows, angles = (each.view(1, -1, 16) for each in layer.rows_of(pages, 16))
    rotation = Rotation(layer.cos, layer.sin, angles)
    what = "min_max"
    found = timed({what: lambda: summarise_rows(layer.keys, rows, rotation=rotation, kind=what)}, device, min_s)
    nbytes = BLOCK_TOKENS * layer.shape.kv_heads * layer.row_nbytes // 2
    report.latency("summarise a block", (what, found[what]), (READING, bandwidth.limit(nbytes)), **case)


def choose(
    report: Report,
    layer: Layer,
    scorer: PageScorer,
    query: Tensor,
    everything: Timed,
    budget: int,
    case: dict[str, object],
    bandwidth: Bandwidth,
    min_s: float,
) -> None:
    """One policy: choosing, attending to what was chosen, and both, beside attention to everything."""
    shape, device, chance = layer.shape, layer.keys.device, torch.Generator().manual_seed(1)
    per_layer = sum(scorer.widths()) * shape.kv_heads * (layer.num_tokens // scorer.page_tokens) * 2
    copies = min(shape.num_layers, 1 + BEYOND_CACHES[device.type] // per_layer)
    stored = [scorer.summaries(layer.num_tokens, device, chance) for _ in range(copies)]
    asking = query.view(shape.kv_heads, -1, shape.dim).float()
    summaries = cycle(stored)
    selections = []
    for number in range(MOST_SELECTIONS):
        other = torch.randn(asking.shape, generator=chance).to(device)
        pages = scorer.choose(other, stored[number % copies], budget)
        selections.append(layer.rows_of(pages, scorer.page_tokens))
    chosen = cycle(selections)

    def both() -> Tensor:
        pages = scorer.choose(asking, next(summaries), budget)
        return layer.attend(query, *layer.rows_of(pages, scorer.page_tokens))

    name = scorer.policy.name
    found = timed(
        {
            "choose": lambda: scorer.choose(asking, next(summaries), budget),
            IN_PLACE: lambda: layer.attend(query, *next(chosen)),
            GATHERED: lambda: layer.gather_and_attend(query, *next(chosen)),
            "both": both,
        },
        device,
        min_s,
    )
    read = selections[0][0].shape[1] * shape.kv_heads * layer.row_nbytes
    case = {**case, "budget": budget, "policy": name}
    report.latency("choose", (name, found["choose"]), (READING, bandwidth.limit(per_layer)), **case)
    for what in (IN_PLACE, GATHERED):
        report.latency("attend to the chosen", (what, found[what]), (READING, bandwidth.limit(read)), **case)
    report.latency("choose and attend", (name, found["both"]), everything, **case)


def check_layer(layer: Layer, query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Both ways to attend to pages are what sdpa makes of the same tokens in one piece."""
    pages = torch.randperm(layer.num_tokens // 16, generator=torch.Generator().manual_seed(2))[:64]
    tokens = (pages[:, None] * 16 + torch.arange(16)).flatten().to(keys.device)
    wanted = attend_to_all(query, keys[:, :, tokens], values[:, :, tokens]).float()
    rows = layer.rows_of(pages[None].to(keys.device), 16)
    for found in (layer.attend(query, *rows), layer.gather_and_attend(query, *rows)):
        check((found.float() - wanted).abs().max().item() < 0.02, "attention to pages differs from sdpa")


def needed_nbytes(shape: Shape, num_tokens: int) -> int:
    """Most memory that a length takes: keys and values twice, angles, and room for summaries."""
    row = 2 * shape.dim * 2 * shape.kv_heads
    return num_tokens * (2 * row + 16 * shape.dim) + (2 << 30)


def free_nbytes(device: torch.device) -> int:
    """Memory that nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


if __name__ == "__main__":
    main()
