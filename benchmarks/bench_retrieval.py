# SPDX-License-Identifier: Apache-2.0
"""What retrieval policies find on a real model: attention, planted notes, right answers; and what choosing costs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import Report, check, options
from kvstore.engines.loading import LanguageModel
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.registry import policies
from kvstore.retrieval.segmenters.pages import Pages
from kvstore.video.model import load
from recall.answering import right_answers
from recall.capture import Layer, capture
from recall.choosers import ByPolicy, Chance, Chooser, Oracle, Recent, prepared
from recall.costs import Costs, costs, index_share
from recall.metrics import mass_recall, needle_coverage
from recall.plot import drawing
from recall.prompts import Prompt, natural_texts, notes_in, passkey

BUDGETS = (256, 512, 1024)
NEEDLE_BUDGET = 256
COST_BUDGET = 512
RIVAL = "quest"
FULL = "full attention"
ORACLE = Oracle(Pages(16))


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Args:
        num_tokens: of every past.
        num_queries: tokens that look back at a natural text.
        num_texts: natural texts.
        depths: of the pass key, one prompt each.
        num_covered: of these prompts, the first ones say how much of the note is read.
        passkey_budget: tokens read when the pass key is asked for.
        notes_budget: tokens read when one of several notes is asked for.
        num_noted: natural texts in which several notes are planted.
        num_notes: in each of them.
    """

    num_tokens: int = 4096
    num_queries: int = 32
    num_texts: int = 3
    depths: tuple[float, ...] = (0.1, 0.35, 0.6, 0.85, 0.2, 0.75)
    num_covered: int = 4
    passkey_budget: int = 128
    notes_budget: int = 512
    num_noted: int = 2
    num_notes: int = 5


QUICK = Plan(num_queries=6, num_texts=1, depths=(0.35,), num_covered=1, num_noted=1, num_notes=2)


@dataclass
class Found:
    """What one chooser achieves; shares of 1, averaged over texts."""

    mass: dict[int, float] = field(default_factory=dict)
    coverage: float = 0.0
    passkeys: float = 0.0
    notes: float = 0.0
    costs: Costs | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="model folder or GGUF file; the default is SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, help="read this file instead of the three natural texts")
    parser.add_argument("--policies", nargs="+", choices=sorted(retrieving()), help="only these; default: all")
    parser.add_argument("--tokens", type=int, default=Plan().num_tokens, help="tokens of every past")
    parser.add_argument("--plot", type=Path, help="draw recovered attention over the budget there, as SVG")


def retrieving() -> dict[str, Policy]:
    """The policies that choose from what lies far behind, by name."""
    return {name: policy for name, policy in policies().items() if policy.segmenter is not None}


def choosers(names: Sequence[str] | None) -> list[Chooser]:
    """The policies, an oracle, and two that do not look."""
    chosen = [policy for name, policy in retrieving().items() if names is None or name in names]
    return [*map(ByPolicy, chosen), ORACLE, Recent(), Chance()]


def oracles(all_choosers: Sequence[Chooser]) -> list[Chooser]:
    """One for each way in which policies cut a text."""
    cuts = dict.fromkeys(chooser.segmenter for chooser in all_choosers if isinstance(chooser, ByPolicy))
    return [Oracle(cut) for cut in cuts if cut != ORACLE.segmenter]


def baseline_of(chooser: Chooser) -> str:
    """What a chooser's recovered attention is compared with: that of the oracle over its own units."""
    return (Oracle(chooser.segmenter) if isinstance(chooser, ByPolicy) else ORACLE).name


def measure_text(
    layers: Sequence[Layer], found: Mapping[str, Found], all_choosers: Sequence[Chooser], num_texts: int
) -> None:
    """Add one text's part of the recovered attention, and note what choosing costs in it."""
    for chooser in all_choosers:
        chooses, one = prepared(chooser, layers), found[chooser.name]
        for budget, mass in mass_recall(chooses, layers, BUDGETS).items():
            one.mass[budget] = one.mass.get(budget, 0.0) + mass / num_texts
        if isinstance(chooser, ByPolicy):
            one.costs = costs(chooses, layers, COST_BUDGET)


def report_mass(report: Report, plan: Plan, all_choosers: Sequence[Chooser], found: Mapping[str, Found]) -> None:
    for chooser in all_choosers:
        base = baseline_of(chooser)
        for budget in BUDGETS:
            case = {"budget": budget, "texts": plan.num_texts, "queries": plan.num_queries}
            mass = (chooser.name, found[chooser.name].mass[budget])
            report.value("attention_mass", "share", mass, (base, found[base].mass[budget]), **case)


def measure_notes(settings: argparse.Namespace, plan: Plan, report: Report, found: Mapping[str, Found]) -> None:
    """Pass keys in a filler, and several notes in natural text: are they read, and does the model answer?"""
    language_model = load(settings.model)
    encode = language_model.encode
    all_choosers = choosers(settings.policies)
    full_passkeys = full_notes = 0.0
    for number, depth in enumerate(plan.depths):
        prompt = passkey(encode, settings.tokens, depth, number)
        layers = capture(language_model, prompt.ids, prompt.num_queries)
        asks = [(ask.asks, ask.note) for ask in prompt.asks]
        full_passkeys += share(everything(language_model, layers, prompt)) / len(plan.depths)
        for chooser in all_choosers:
            chooses, one = prepared(chooser, layers), found[chooser.name]
            read = (chooses, chooser.position, plan.passkey_budget)
            answers = right_answers(language_model, layers, prompt, *read)
            one.passkeys += share(answers) / len(plan.depths)
            if number < plan.num_covered:
                one.coverage += needle_coverage(chooses, layers, asks, NEEDLE_BUDGET) / plan.num_covered
    texts = natural_texts(encode, settings.tokens, 0, settings.text)
    noted = list(texts.values())[: plan.num_noted]
    for text in noted:
        prompt = notes_in(encode, text.ids, settings.tokens, plan.num_notes)
        layers = capture(language_model, prompt.ids, prompt.num_queries)
        full_notes += share(everything(language_model, layers, prompt)) / len(noted)
        for chooser in all_choosers:
            read = (prepared(chooser, layers), chooser.position, plan.notes_budget)
            answers = right_answers(language_model, layers, prompt, *read)
            found[chooser.name].notes += share(answers) / len(noted)
    check(full_passkeys > 0 and full_notes > 0, "the model answers nothing with full attention")
    for chooser in all_choosers:
        one, oracle = found[chooser.name], found[ORACLE.name]
        case = {"budget": NEEDLE_BUDGET, "prompts": plan.num_covered}
        report.value("needle_coverage", "share", (chooser.name, one.coverage), (ORACLE.name, oracle.coverage), **case)
        case = {"budget": plan.passkey_budget, "prompts": len(plan.depths)}
        report.value("passkey", "right answers", (chooser.name, one.passkeys), (FULL, full_passkeys), **case)
        case = {"budget": plan.notes_budget, "texts": len(noted), "notes": plan.num_notes}
        report.value("notes", "right answers", (chooser.name, one.notes), (FULL, full_notes), **case)


def everything(language_model: LanguageModel, layers: Sequence[Layer], prompt: Prompt) -> list[bool]:
    """Which notes the model says with full attention."""
    return right_answers(language_model, layers, prompt, None, PositionPolicy.ORIGINAL, 0)


def report_costs(report: Report, found: Mapping[str, Found], layers: Sequence[Layer]) -> dict[str, float]:
    """Report what choosing costs; returns microseconds in one layer by policy."""
    measured = {name: one.costs for name, one in found.items() if one.costs is not None}
    rival = RIVAL if RIVAL in measured else next(iter(measured))
    for name, one in measured.items():
        case = {"budget": COST_BUDGET}
        report.latency("select, one layer", (name, one.layer), (rival, measured[rival].layer), **case)
        report.latency("select, all layers", (name, one.token), (rival, measured[rival].token), **case)
        against = ("what a token reads", one.read_nbytes)
        report.value("moved", "bytes/token", (name, one.moved_nbytes), against, policy=name, **case)
        report.value("index", "of KV", (name, index_share(policies()[name], layers[-1])), ("KV", 1.0))
    return {name: one.layer.median_s * 1e6 for name, one in measured.items()}


def share(answers: Sequence[bool]) -> float:
    """Right ones of all."""
    return sum(answers) / len(answers)


def table(found: Mapping[str, Found], layer_us: Mapping[str, float], plan: Plan) -> str:
    """All choosers side by side, by the attention that the middle budget recovers."""
    head = ["", *(f"mass@{budget}" for budget in BUDGETS), f"needle@{NEEDLE_BUDGET}"]
    head += [f"passkey@{plan.passkey_budget}", f"notes@{plan.notes_budget}", "us/layer"]
    rows = [head]
    for name, one in sorted(found.items(), key=lambda item: -item[1].mass[BUDGETS[1]]):
        shares = [*(one.mass[budget] for budget in BUDGETS), one.coverage, one.passkeys, one.notes]
        rows.append([name, *(f"{each:.3f}" for each in shares), f"{layer_us[name]:.0f}" if name in layer_us else ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Capture each text once, then let every policy choose from it."""
    settings = options("retrieval", __doc__, add_options)
    plan = QUICK if settings.quick else Plan()
    if settings.text is not None:
        plan = dataclasses.replace(plan, num_texts=1, num_noted=1)
    all_choosers = choosers(settings.policies)
    with_oracles = [*all_choosers, *oracles(all_choosers)]
    found = {chooser.name: Found() for chooser in with_oracles}
    language_model = load(settings.model)
    report = Report(settings, {"model": language_model.path.stem, "past": settings.tokens})
    texts = natural_texts(language_model.encode, settings.tokens, plan.num_queries, settings.text)
    layers: list[Layer] = []
    for prompt in list(texts.values())[: plan.num_texts]:
        layers = capture(language_model, prompt.ids, prompt.num_queries)
        measure_text(layers, found, with_oracles, plan.num_texts)
    report_mass(report, plan, all_choosers, found)
    layer_us = report_costs(report, found, layers)
    measure_notes(settings, plan, report, found)
    print(table({chooser.name: found[chooser.name] for chooser in all_choosers}, layer_us, plan))
    if settings.plot is not None:
        settings.plot.write_text(drawing({name: one.mass for name, one in found.items()}), encoding="utf-8")
    report.write()


if __name__ == "__main__":
    main()
