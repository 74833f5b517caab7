# SPDX-License-Identifier: Apache-2.0
"""What the codec's profiles and their rivals keep of a model's keys and values: size, KL, agreement, planted facts."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from harness import Report, check, options
from kvstore.decision import KL_LIMITS
from kvstore.record import Profile
from quality.corpus import Corpus, corpus
from quality.judge import Judge, Summary, Verdict, summed_up
from quality.key_transforms import KEY_TRANSFORMS, MULTS
from quality.line_up import line_up
from quality.plot import Point, drawing
from quality.scheme import Coded, Scheme

QUICK_DOCUMENTS, QUICK_POSITIONS = 1, 128
POSITIONS = 512
RAW_BITS = ("bfloat16", 16.0)
EXACT = "exact KV"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, help="draw KL over bits per element there, as SVG")
    parser.add_argument("--transforms", action="store_true", help="compare ways to prepare K instead, simulated")


def report_scheme(
    scheme: Scheme, kv: Corpus, judge: Judge, num_documents: int, exact: Summary, report: Report
) -> Point:
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
    case = {"documents": num_documents}
    report.value("key_bits", "bits/element", (scheme.name, bits[0]), RAW_BITS, **case)
    report.value("value_bits", "bits/element", (scheme.name, bits[1]), RAW_BITS, **case)
    report.value("size", "raw/stored", (scheme.name, 32 / sum(bits)), ("bfloat16", 1.0), **case)
    return Point(scheme.name, sum(bits) / 2, report_verdict(scheme.name, verdicts, exact, report, **case))


def report_verdict(name: str, verdicts: list[Verdict], exact: Summary, report: Report, **case: object) -> float:
    """Report the quality over all documents beside that of exact KV; returns the KL divergence."""
    found = summed_up(verdicts)
    limit = name if name in KL_LIMITS else Profile.Q4.value
    report.value("kl", "nats/token", (name, found.kl), (f"promise of {limit}", KL_LIMITS[limit]), **case)
    report.value("top1", "share", (name, found.top1), (EXACT, exact.top1), **case)
    report.value("perplexity", "of that with exact KV", (name, 1 + found.perplexity), (EXACT, 1.0), **case)
    report.value("needles", "share", (name, found.needles), (EXACT, exact.needles), **case)
    return found.kl


def _is_exact(coded: Coded, kv: Corpus, document: int) -> bool:
    return torch.equal(coded.keys, kv.keys[document].float()) and torch.equal(coded.values, kv.values[document].float())


def compare_transforms(kv: Corpus, judge: Judge, num_documents: int, exact: Summary, report: Report) -> None:
    """Ways to prepare K at several steps, V exact: payload only, without the overheads that all share."""
    for transform in KEY_TRANSFORMS:
        for mult in MULTS:
            verdicts = []
            bits = 0.0
            for document in range(num_documents):
                keys, stored = transform.code(kv, document, mult)
                bits += stored / keys.numel() / num_documents
                verdicts.append(judge.judge(document, keys, kv.values[document].float()))
            case = {"mult": mult, "documents": num_documents, "simulated": True}
            report.value("key_bits", "bits/element", (transform.name, bits), RAW_BITS, **case)
            report_verdict(transform.name, verdicts, exact, report, **case)


def main() -> None:
    """Compare all schemes, or all transforms, on one corpus."""
    settings = options("quality", __doc__, add_options)
    kv = corpus()
    num_documents, positions = (QUICK_DOCUMENTS, QUICK_POSITIONS) if settings.quick else (len(kv.documents), POSITIONS)
    judge = Judge(kv, num_documents, positions)
    exact = summed_up([judge.judge_exact(document) for document in range(num_documents)])
    check(exact.needles > 0, "the model completes no planted fact with exact keys and values")
    report = Report(settings)
    if settings.transforms:
        compare_transforms(kv, judge, num_documents, exact, report)
    else:
        schemes = line_up(is_quick=settings.quick)
        points = [report_scheme(scheme, kv, judge, num_documents, exact, report) for scheme in schemes]
        if settings.plot is not None:
            settings.plot.write_text(drawing([point for point in points if point.kl > 0]), encoding="utf-8")
    report.write()


if __name__ == "__main__":
    main()
