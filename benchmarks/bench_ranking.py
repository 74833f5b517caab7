# SPDX-License-Identifier: Apache-2.0
"""Ranking blocks by late interaction: latency over the number of blocks, and recall against exact scores."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from harness import Report, alternate, check, options
from kvstore.kernels.reference import best_similarity
from kvstore.retrieval.index.faiss_index import FaissIndex, is_faiss_installed
from kvstore.retrieval.index.flat import FlatIndex, SummaryIndex
from kvstore.retrieval.maxsim import LateInteraction, MaxSimScorer
from real_kv import add_options, corpus

QUESTION_TOKENS = 12
RULE = LateInteraction()
NUM_QUESTIONS = 8
TOP = 5
JITTER = 0.3
"""Length of the noise added to a copy, over the length of the key: copies rank near their original, but not level."""


def grown(blocks: list[Tensor], num_blocks: int) -> list[Tensor]:
    """The given blocks, then noisy copies of them up to `num_blocks`."""
    generator = torch.Generator().manual_seed(0)
    found = blocks[:num_blocks]
    for source in cycle(blocks):
        if len(found) == num_blocks:
            return found
        noise = torch.randn(source.shape, generator=generator) / source.shape[-1] ** 0.5
        found.append(source + JITTER * source.norm(dim=-1, keepdim=True) * noise)
    raise AssertionError("cycle never ends")


def questions_from(blocks: list[Tensor]) -> list[Tensor]:
    """Runs of tokens of some blocks, with noise: what a question that quotes a passage looks like."""
    generator = torch.Generator().manual_seed(1)
    step = max(len(blocks) // NUM_QUESTIONS, 1)
    runs = [block[:QUESTION_TOKENS] for block in blocks[::step][:NUM_QUESTIONS]]
    return [
        run
        + JITTER * run.norm(dim=-1, keepdim=True) * torch.randn(run.shape, generator=generator) / run.shape[-1] ** 0.5
        for run in runs
    ]


def exact_scores(question: Tensor, blocks: list[Tensor], mean: Tensor) -> Tensor:
    """Scores in float32, by the definition: best match per block above the floor, summed over the question's tokens."""
    rows, asked = (
        torch.nn.functional.normalize(part - mean, dim=-1).flatten(1) for part in (torch.cat(blocks), question)
    )
    row_starts = torch.tensor([0, *(len(block) for block in blocks)]).cumsum(0).int()
    floor = (asked @ rows.T).topk(min(RULE.hits_per_token, len(rows)), dim=1).values[:, -1:]
    return (best_similarity(asked, rows, row_starts) - floor).clamp_min(0).sum(dim=0)


def main() -> None:
    """Measure over the token keys of a real stream, grown with noisy copies where it is too short."""
    settings = options("ranking", __doc__, add_options)
    sizes = [64, 512] if settings.quick else [64, 512, 4096]
    kv = corpus(settings, 16 if settings.quick else max(sizes))
    if is_faiss_installed():
        import faiss  # its OpenMP threads are set apart from torch's

        faiss.omp_set_num_threads(settings.threads)
    layers = list(RULE.layers(kv.layout.spec.num_layers))
    keys = [
        kv.layout.keys(slot)[layers, :, :count].permute(2, 0, 1, 3).flatten(2).float()
        for slot, count in zip(kv.slots, kv.num_tokens, strict=True)
    ]
    mean = torch.cat(keys).mean(dim=0)
    makers: dict[str, Callable[[int], SummaryIndex]] = {"torch": FlatIndex}
    if is_faiss_installed():
        makers["faiss"] = FaissIndex
    report = Report(settings, {"origin": kv.origin})
    for size in sizes:
        blocks = grown(keys, size)
        questions = questions_from(blocks)
        scorers = {
            name: MaxSimScorer(make(blocks[0][0].numel()), mean, RULE.hits_per_token) for name, make in makers.items()
        }
        for scorer in scorers.values():
            scorer.add(enumerate(blocks))
        case = {"blocks": size, "tokens": sum(len(block) for block in blocks), "question_tokens": QUESTION_TOKENS}
        for name, scorer in scorers.items():
            hits = 0
            for question in questions:
                exact = set(exact_scores(question, blocks, mean).topk(TOP).indices.tolist())
                hits += len(exact & set(scorer.rank(question, size).blocks[:TOP].tolist()))
            recall = hits / (TOP * len(questions))
            check(recall > 0.5, f"{name} finds {recall:.2f} of the exact top {TOP}")
            report.value(f"recall@{TOP}", "share", (name, recall), ("exact scores", 1.0), **case)
        asked = cycle(questions)
        timings = alternate({name: ranker(scorer, asked, size) for name, scorer in scorers.items()})
        for name, timing in timings.items():
            report.latency("rank", (name, timing), ("torch", timings["torch"]), **case)
    report.write()


def ranker(scorer: MaxSimScorer, asked: cycle[Tensor], num_blocks: int) -> Callable[[], object]:
    """A call that ranks all blocks for the next question."""
    return lambda: scorer.rank(next(asked), num_blocks)


if __name__ == "__main__":
    main()
