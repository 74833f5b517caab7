# SPDX-License-Identifier: Apache-2.0
"""What the codec's profiles and their rivals keep of a model's keys and values: size, KL, agreement, planted facts."""

from __future__ import annotations

import argparse
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from harness import Report, check, measure, options
from kvstore.codec import Profile
from quality.corpus import Corpus, corpus
from quality.judge import Judge, Verdict, summed_up
from quality.key_transforms import KEY_TRANSFORMS, MULTS
from quality.line_up import line_up
from quality.ours import codec_without, layout_of, slots_of
from quality.plot import Point, drawing
from quality.rivals import BLOCK_TOKENS
from quality.scheme import Coded, Scheme

QUICK_DOCUMENTS, QUICK_POSITIONS = 1, 128
POSITIONS = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, help="draw KL over bits per element there, as SVG")
    parser.add_argument("--transforms", action="store_true", help="compare ways to prepare K instead, simulated")


def report_scheme(scheme: Scheme, kv: Corpus, judge: Judge, num_documents: int, report: Report) -> Point:
    """Code and judge the documents, and report the means."""
    verdicts = []
    bits = [0.0, 0.0]
    for document in range(num_documents):
        coded = scheme.code(kv, document)
        if scheme.is_exact:
            check(_is_exact(coded, kv, document), f"{scheme.name} does not give back what it was given")
            verdicts.append(judge.judge_exact(document))
        else:
            verdicts.append(judge.judge(document, coded.keys, coded.values))
        bits[0] += coded.key_bits / coded.keys.numel() / num_documents
        bits[1] += coded.value_bits / coded.values.numel() / num_documents
    case = {"scheme": scheme.name, "documents": num_documents}
    report.value("key_bits", bits[0], "bits/element", **case)
    report.value("value_bits", bits[1], "bits/element", **case)
    report.value("ratio", 32 / sum(bits), "raw/stored", **case)
    return Point(scheme.name, sum(bits) / 2, report_verdict(verdicts, report, **case))


def report_verdict(verdicts: list[Verdict], report: Report, **case: object) -> float:
    """Report the quality over all documents; returns the KL divergence."""
    found = summed_up(verdicts)
    report.value("kl", found.kl, "nats/token", **case)
    report.value("top1", 100 * found.top1, "%", **case)
    report.value("perplexity", 100 * found.perplexity, "% change", **case)
    report.value("needles", 100 * found.needles, "% completed", **case)
    return found.kl


def _is_exact(coded: Coded, kv: Corpus, document: int) -> bool:
    return torch.equal(coded.keys, kv.keys[document].float()) and torch.equal(coded.values, kv.values[document].float())


def report_speed(profile: Profile, kv: Corpus, report: Report) -> None:
    """Time one block a call, in one thread."""
    layout = layout_of(kv)
    codec = codec_without(kv, 0, profile)
    slots = slots_of(kv, 0, layout)
    out = memoryview(bytearray(codec.bound(BLOCK_TOKENS)))
    records = [bytes(out[: codec.encode(slot, BLOCK_TOKENS, BLOCK_TOKENS, out)]) for slot in slots]
    decoded = torch.zeros_like(slots[0])
    sources, coded = cycle(slots), cycle(records)
    amount = BLOCK_TOKENS * layout.spec.token_nbytes / 1e9
    case: dict[str, Any] = {"scheme": str(profile), "block_tokens": BLOCK_TOKENS}
    encoding = measure(lambda: codec.encode(next(sources), BLOCK_TOKENS, BLOCK_TOKENS, out))
    report.rate("encode", amount, "GB/s", encoding, **case)
    report.rate(
        "decode", amount, "GB/s", measure(lambda: codec.decode(next(coded), decoded, num_tokens=BLOCK_TOKENS)), **case
    )


def compare_transforms(kv: Corpus, judge: Judge, num_documents: int, report: Report) -> None:
    """Ways to prepare K at several steps, V exact: payload only, without the overheads that all share."""
    for transform in KEY_TRANSFORMS:
        for mult in MULTS:
            verdicts = []
            bits = 0.0
            for document in range(num_documents):
                keys, stored = transform.code(kv, document, mult)
                bits += stored / keys.numel() / num_documents
                verdicts.append(judge.judge(document, keys, kv.values[document].float()))
            case = {"transform": transform.name, "mult": mult, "documents": num_documents, "simulated": True}
            report.value("key_bits", bits, "bits/element", **case)
            report_verdict(verdicts, report, **case)


def main() -> None:
    """Compare all schemes, or all transforms, on one corpus."""
    settings = options(__doc__ or "", add_options)
    kv = corpus()
    num_documents, positions = (QUICK_DOCUMENTS, QUICK_POSITIONS) if settings.quick else (len(kv.documents), POSITIONS)
    judge = Judge(kv, num_documents, positions)
    report = Report("quality", settings)
    if settings.transforms:
        compare_transforms(kv, judge, num_documents, report)
    else:
        schemes = line_up(is_quick=settings.quick)
        points = [report_scheme(scheme, kv, judge, num_documents, report) for scheme in schemes]
        for profile in Profile:
            report_speed(profile, kv, report)
        if settings.plot is not None:
            settings.plot.write_text(drawing([point for point in points if point.kl > 0]), encoding="utf-8")
    report.write()


if __name__ == "__main__":
    main()
