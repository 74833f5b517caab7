# SPDX-License-Identifier: Apache-2.0
"""Indices over summaries: latency, recall and memory per backend and size, and ten million summaries layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from harness import Clock, Report, Timed, Timing, alternate, check, cpu, options, wall
from index_rows import NUM_QUERIES, Sample, gaussian, of_model
from kvstore.retrieval.index.byte_rows import ByteCoding
from kvstore.retrieval.index.coding import Coding
from kvstore.retrieval.index.faiss_index import is_faiss_installed
from kvstore.retrieval.index.faiss_partitions import FaissPartitions, FaissRows
from kvstore.retrieval.index.float_rows import FloatCoding
from kvstore.retrieval.index.oracle import recall
from kvstore.retrieval.index.partitions import MatrixIndex, PartitionedIndex
from kvstore.retrieval.index.reduced_rows import ReducedCoding
from kvstore.retrieval.index.segmented import SegmentedIndex
from kvstore.retrieval.index.snapshot import search_together
from real_kv import add_options

K = 64
"""Rows wanted: pages of 16 tokens for a budget of 1,024."""
SEARCHED_NBYTES = 128 << 20
"""Indices of a size are built and searched in turn until they hold so much, as layers of a model are: a single one
would stay in the caches."""
MOST_LAYERS = 30
SUMMARIES = 10_000_000
GEOMETRIES = {"SmolLM2-135M, bounds": (30, 3, 128), "Llama-3-8B, bounds": (32, 8, 256)}
"""Layers, KV heads, elements of a summary."""
TOGETHER = 4
"""Layers searched in one call, as with the queries of the step before."""
WITHIN: Timed = ("5 ms", Timing(5e-3, 5e-3, 5e-3, 1))

CLOCKS: dict[str, Clock] = {"wall": wall, "cpu": cpu}
SLOW, SLOW_ROWS = "float8", 1 << 14
"""Timed up to so many rows only."""

Make = Callable[[Sample], PartitionedIndex]


def segmented(coding: Coding | None) -> Make:
    """Makes the growing index with one coding."""
    return lambda sample: SegmentedIndex(sample.rows.shape[0], sample.rows.shape[2], coding)


def reduced(share: int, is_weighed: bool) -> Make:
    """Makes the growing index over projections on 1 / `share` of the elements, learnt of the first 2,048 rows."""

    def make(sample: Sample) -> PartitionedIndex:
        asked = sample.queries[:, : NUM_QUERIES // 2] if is_weighed else None
        width = sample.rows.shape[2]
        coding = ReducedCoding.fitted(sample.rows[:, :2048], width // share, ByteCoding(), asked)
        return SegmentedIndex(sample.rows.shape[0], width, coding)

    return make


def faiss_partitions(rows: FaissRows, ivf_rows: int = 1 << 30) -> Make:
    """Makes FAISS indices."""
    return lambda sample: FaissPartitions(sample.rows.shape[0], sample.rows.shape[2], rows, ivf_rows=ivf_rows)


EXACT = "torch float32"
BACKENDS: dict[str, tuple[Make, float]] = {
    EXACT: (lambda sample: MatrixIndex(sample.rows.shape[0], sample.rows.shape[2]), 4),
    "float16": (segmented(FloatCoding(torch.float16)), 2),
    "bfloat16": (segmented(FloatCoding(torch.bfloat16)), 2),
    "float8": (segmented(FloatCoding(torch.float8_e4m3fn)), 1),
    "bytes": (segmented(None), 1),
    "bytes of half by PCA": (reduced(2, False), 1 / 2),
    "bytes of half by weighed PCA": (reduced(2, True), 1 / 2),
}
"""Each with bytes per element of its sealed rows."""
if is_faiss_installed():
    BACKENDS |= {
        "faiss float32": (faiss_partitions(FaissRows.FLOAT32), 4),
        "faiss float16": (faiss_partitions(FaissRows.FLOAT16), 2),
        "faiss bytes": (faiss_partitions(FaissRows.BYTES), 1),
        "faiss lists": (faiss_partitions(FaissRows.FLOAT16, 1 << 13), 2),
    }


def exact_best(sample: Sample) -> Tensor:
    """The best rows by float32 products, for the half of the queries that nothing was learnt of."""
    asked = sample.queries[:, NUM_QUERIES // 2 :]
    return torch.bmm(asked, sample.rows.transpose(1, 2)).topk(min(K, sample.rows.shape[1])).indices


def found_by(index: PartitionedIndex, sample: Sample) -> Tensor:
    """What an index finds for the same queries."""
    return index.search(sample.queries[:, NUM_QUERIES // 2 :], K)[1]


def searches(indices: list[PartitionedIndex], sample: Sample, num_queries: int) -> Callable[[], object]:
    """A call that searches the next index for the next queries."""
    turn = cycle(indices)
    asked = cycle(sample.queries.split(num_queries, dim=1)[: NUM_QUERIES // num_queries])
    return lambda: next(turn).search(next(asked), K)


def reads(nbytes: int, copies: int) -> Callable[[], object]:
    """A call that reads as many bytes, the next ones of several copies: the limit of any index that looks at all."""
    turn = cycle(torch.ones(copies, nbytes // 8, dtype=torch.int64))
    return lambda: next(turn).sum()


def compare(report: Report, sample: Sample, num_rows: int, min_s: float) -> None:
    """All backends over the same rows."""
    sample = sample.grown(num_rows, sample.rows.shape[0])
    partitions, _, width = sample.rows.shape
    elements = partitions * num_rows * width
    wanted = exact_best(sample)
    indices: dict[str, list[PartitionedIndex]] = {}
    for name, (make, nbytes) in BACKENDS.items():
        if name == SLOW and num_rows > SLOW_ROWS:
            continue
        copies = min(MOST_LAYERS, 1 + int(SEARCHED_NBYTES / (elements * nbytes)))
        indices[name] = [make(sample) for _ in range(copies)]
        for index in indices[name]:
            index.add(sample.rows)
    for num_queries in (1, 4):
        case = {"rows": num_rows, "width": width, "partitions": partitions, "queries": num_queries, "of": sample.origin}
        calls = {name: searches(each, sample, num_queries) for name, each in indices.items()}
        for clock_name, clock in CLOCKS.items():
            found = alternate(calls, clock=clock, min_s=min_s)
            for name, timing in found.items():
                report.latency("search", (name, timing), (EXACT, found[EXACT]), clock=clock_name, **case)
    case = {"rows": num_rows, "width": width, "partitions": partitions, "of": sample.origin}
    for name, each in indices.items():
        share = recall(found_by(each[0], sample), wanted)
        check(share >= 0.95 or name not in ("bytes", "float16", EXACT), f"{name} finds {share:.3f} of the best {K}")
        report.value(f"recall@{K}", "share", (name, share), (EXACT, 1.0), **case)
        if isinstance(each[0], SegmentedIndex):
            report.value("memory", "bytes/element", (name, each[0].nbytes / elements), (EXACT, 4.0), **case)


def ten_million(report: Report, name: str, sample: Sample, num_layers: int, min_s: float) -> None:
    """So many summaries in all layers of a model, as bytes: the time of one layer."""
    layers, partitions, width = GEOMETRIES[name]
    num_rows = -(-SUMMARIES // (layers * partitions))
    sample = sample.grown(num_rows, partitions)
    case = {"model": name, "layers": num_layers, "partitions": partitions, "rows": num_rows, "width": width}
    case["of"] = sample.origin
    exact = MatrixIndex(partitions, width)
    exact.add(sample.rows)
    indices = [SegmentedIndex(partitions, width) for _ in range(num_layers)]
    for index in indices:
        index.add(sample.rows)
    nbytes = sum(index.nbytes for index in indices)
    share = recall(found_by(indices[0], sample), exact_best(sample))
    check(share >= 0.95, f"{share:.3f} of the best {K} are found")
    report.value(f"recall@{K}", "share", ("bytes", share), (EXACT, 1.0), **case)
    elements = num_layers * partitions * num_rows * width
    report.value("memory", "bytes/element", ("bytes", nbytes / elements), (EXACT, 4.0), **case)
    snapshots = [index.snapshot() for index in indices]
    groups = cycle(snapshots[at : at + TOGETHER] for at in range(0, num_layers - TOGETHER + 1, TOGETHER))
    queries = [sample.queries[:, :1]] * TOGETHER
    one, several, limit = "bytes", f"bytes, {TOGETHER} layers at once", "reading its bytes"
    calls = {
        limit: reads(nbytes // num_layers, 1 + SEARCHED_NBYTES * num_layers // nbytes),
        EXACT: searches([exact], sample, 1),
        one: searches(list(indices), sample, 1),
        several: lambda: search_together(next(groups), queries, K),
    }
    for clock_name, clock in CLOCKS.items():
        found = alternate(calls, clock=clock, min_s=min_s)
        found[several] = per_layer(found[several])
        for what in (one, several):
            report.latency("search of a layer", (what, found[what]), (EXACT, found[EXACT]), clock=clock_name, **case)
            against = (limit, found[limit])
            report.latency("search of a layer over its limit", (what, found[what]), against, clock=clock_name, **case)
        report.latency("search of a layer within", (one, found[one]), WITHIN, clock=clock_name, **case)


def per_layer(timing: Timing) -> Timing:
    """A search of `TOGETHER` layers as that of one."""
    return Timing(timing.median_s / TOGETHER, timing.p10_s / TOGETHER, timing.p90_s / TOGETHER, timing.iterations)


def main() -> None:
    """Compare backends over real summaries and noise, then search ten million summaries."""
    settings = options("index", __doc__, add_options)
    if is_faiss_installed():
        import faiss  # its OpenMP threads are set apart from torch's

        faiss.omp_set_num_threads(settings.threads)
    min_s = 0.03 if settings.quick else 0.2
    samples = [*of_model(settings.model, 2048 if settings.quick else 16384), gaussian(3, 8192, 128)]
    report = Report(settings)
    for sample in samples[: 1 if settings.quick else None]:
        for num_rows in (2048, 8192) if settings.quick else (2048, 16384, 111_112):
            compare(report, sample, num_rows, min_s)
    for name, (layers, _, width) in GEOMETRIES.items():
        if not settings.quick or name == next(iter(GEOMETRIES)):
            rows = [each for each in samples if each.rows.shape[2] == width] or [gaussian(8, 8192, width)]
            for sample in rows:
                ten_million(report, name, sample, TOGETHER if settings.quick else layers, min_s)
    report.write()


if __name__ == "__main__":
    main()
