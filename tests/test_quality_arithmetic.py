# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality: the rivals' arithmetic, the simulated coders and the measures say what they should."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    from quality import rivals
    from quality.judge import Verdict, divergence, summed_up
    from quality.key_transforms import coded_bits, quantised, shape_of
    from quality.plot import Point, drawing
    from quality.texts import CONTINUATION_TOKENS, NEEDLES, PROMPT_TOKENS, planted

SHAPE = (12, 2, 256, 64)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_err_by_half_a_step_at_most(rows: Tensor, bits: int) -> None:
    restored, size = rivals.integers(rows, bits)
    step = rows.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((restored - rows).abs() <= 0.51 * step).all())
    assert size == rows.numel() * (bits + 16 / 64)


def test_integers_keep_rows_of_zeros() -> None:
    restored, _ = rivals.integers(torch.zeros(1, 1, 2, 64), 4)
    assert not restored.any()


def test_float8_keeps_what_it_can_say_and_saturates() -> None:
    restored, size = rivals.float8(torch.tensor([[[[1.5, -448.0, 1000.0, 0.0]]]]))
    assert restored.flatten().tolist() == [1.5, -448.0, 448.0, 0.0]
    assert size == 32


def test_kivi_keeps_the_ends_of_every_group() -> None:
    group = torch.linspace(-3.0, 4.5, 32)
    restored, size = rivals.kivi_values(group.view(1, 1, 1, 32), 2)
    assert restored.flatten()[[0, -1]].tolist() == [-3.0, 4.5]
    assert set(restored.flatten().tolist()) == {-3.0, -0.5, 2.0, 4.5}
    assert size == 32 * (2 + 1)


def test_kivi_keys_are_grouped_along_tokens(rows: Tensor) -> None:
    spoilt = rows.clone()
    spoilt[:, :, 0, 5] = 1000.0
    before, _ = rivals.kivi_keys(rows, 4)
    after, _ = rivals.kivi_keys(spoilt, 4)
    changed = (before != after).flatten(0, 1).any(0)
    assert bool(changed[:32, 5].any())
    changed[:32, 5] = False
    assert not changed.any()


def test_cachegen_has_half_the_bins_behind_the_fine_layers(rows: Tensor) -> None:
    restored, _ = rivals.cachegen(rows, fine_layers=10)
    scale = rows.transpose(1, 2).flatten(2).abs().amax(-1)[:, None, :, None]
    error = ((restored - rows).abs() / scale).amax((1, 2, 3))
    assert bool((error[:10] <= 0.52 / 15).all())
    assert bool((error[10:] > 0.52 / 15).all())
    assert bool((error <= 0.54 / 7).all())


def test_cachegen_stores_tables_that_cost_as_much_as_notes_on_it_say() -> None:
    _, size = rivals.cachegen(torch.full(SHAPE, 3.0), fine_layers=10)
    tables = (33 * 16 + 32) / 256
    assert tables <= size / math.prod(SHAPE) <= tables + 0.25


def test_zstd_is_exact_and_splitting_bytes_helps_it(rows: Tensor) -> None:
    given = rows[:2].bfloat16()
    (plain, whole), (_, split) = (rivals.zstd(given, 3, split=choice) for choice in (False, True))
    assert torch.equal(plain, given.float())
    assert split < whole < given.numel() * 16


@pytest.mark.parametrize("is_predicted", [False, True])
def test_quantised_rows_never_drift(rows: Tensor, is_predicted: bool) -> None:
    walk = rows.cumsum(2) / 8
    step = torch.tensor(0.25)
    shape = shape_of([walk])
    symbols, restored = quantised(walk, step, shape.rho if is_predicted else None)
    assert bool(((restored - walk).abs() <= 0.51 * step).all())
    assert (symbols.abs().mean() < 3) == is_predicted


def test_coded_bits_of_a_gaussian_are_its_entropy() -> None:
    symbols = (4 * torch.randn(100_000, 2, generator=torch.Generator().manual_seed(1))).round()
    entropy = 0.5 * math.log2(2 * math.pi * math.e) + 2
    assert coded_bits(symbols, torch.tensor([4.0, 4.0])) / symbols.numel() == pytest.approx(entropy, abs=0.02)


def test_what_no_table_holds_costs_an_exception() -> None:
    quiet = torch.zeros(1000, 1)
    loud = quiet.clone()
    loud[0] = 500
    spread = torch.tensor([1.0])
    added = coded_bits(loud, spread) - coded_bits(quiet, spread)
    assert 32 < added < 32 + 12


def test_divergence_is_zero_for_equals_and_right_for_coins() -> None:
    fair, biased = (torch.tensor([p, 1 - p]).log() for p in (0.5, 0.25))
    assert float(divergence(fair, fair)) == 0
    assert float(divergence(fair, biased)) == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))


def test_summing_up_weighs_positions_alike() -> None:
    one = Verdict(torch.tensor([0.0, 0.0, 0.3]), torch.tensor([True, True, False]), 0.1, torch.tensor([True]))
    two = Verdict(torch.tensor([0.1]), torch.tensor([True]), 0.3, torch.tensor([False]))
    found = summed_up([one, two])
    assert found.kl == pytest.approx(0.1)
    assert found.top1 == 0.75
    assert found.perplexity == pytest.approx(math.expm1(0.2))
    assert found.needles == 0.5


def test_planted_facts_stand_in_the_prompt() -> None:
    facts = [
        {"sentence": f"Note: door {number} opens with {number}{number}.", "answer": f"{number}{number}"}
        for number in range(NEEDLES)
    ]
    text = "\n\n".join(f"paragraph {number} says nothing" for number in range(200))
    found = planted("made up", text, facts, lambda part: list(part.encode()))
    said = bytes(found.ids[:PROMPT_TOKENS]).decode()
    assert len(found.ids) == PROMPT_TOKENS + CONTINUATION_TOKENS + 1
    assert all(said.count(fact["sentence"]) == 1 for fact in facts)
    assert [bytes(needle.ids).decode() for needle in found.needles] == [f"{fact['sentence']}\n\n" for fact in facts]
    assert [bytes(needle.ids[needle.answer]).decode().strip() for needle in found.needles] == [
        fact["answer"] for fact in facts
    ]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(SystemExit, match="made up: the text has 2 tokens"):
        planted("made up", "", [{"sentence": "a", "answer": "a"}] * NEEDLES, lambda part: list(part.encode()))


def test_the_plot_names_every_scheme() -> None:
    root = ElementTree.fromstring(drawing([Point("a & b", 2.5, 1e-3), Point("c", 8.0, 0.5)]))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"a & b", "c"} <= set(texts)
