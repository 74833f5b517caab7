# SPDX-License-Identifier: Apache-2.0
"""The retrieval benchmark as a whole: on tiny models, whose answers are known, and on the real one, for floors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from kvstore.engines.loading import LanguageModel
from kvstore.retrieval.positions import PositionPolicy
from tests.tiny_models import make_model, token_ids

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_retrieval
    from bench_retrieval import BUDGETS, Found, Plan
    from harness import Report, check_rows
    from recall.answering import right_answers
    from recall.capture import SINK_TOKENS, WINDOW_TOKENS, capture
    from recall.choosers import Chance, Recent, prepared
    from recall.prompts import Ask, Prompt

NUM_PAST = SINK_TOKENS + 64 + WINDOW_TOKENS
ANSWER = 4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_whoever_reads_everything_says_what_the_model_says(family: str) -> None:
    model = make_model(family)
    ids = token_ids(NUM_PAST + 3)
    with torch.inference_mode():
        for _ in range(ANSWER):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    said = ids[0].tolist()
    ask = Ask(slice(SINK_TOKENS, SINK_TOKENS + 8), slice(0, 3), slice(3, 3 + ANSWER))
    prompt = Prompt(said[:-1], 3 + ANSWER - 1, (ask,), said[-1])
    other = Prompt(said[:-1], 3 + ANSWER - 1, (ask,), (said[-1] + 1) % 100)
    language_model = LanguageModel(model, None, Path(family))
    layers = capture(language_model, prompt.ids, prompt.num_queries)

    chooses = prepared(Recent(), layers)
    for read in (
        (None, PositionPolicy.ORIGINAL, 0),
        (chooses, PositionPolicy.ORIGINAL, 64),
        (chooses, PositionPolicy.GROUP, 64),
    ):
        assert right_answers(language_model, layers, prompt, *read) == [True]
        assert right_answers(language_model, layers, other, *read) == [False]
    forward = type(model.model.layers[0].self_attn).forward
    assert model.model.layers[0].self_attn.forward.__func__ is forward


def test_every_row_of_a_text_has_its_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    language_model = LanguageModel(make_model(num_hidden_layers=4), None, Path("tiny"))
    layers = capture(language_model, token_ids(NUM_PAST + 3)[0].tolist(), 3)
    every = bench_retrieval.choosers(["quest", "auto"])
    with_oracles = [*every, *bench_retrieval.oracles(every)]
    found = {chooser.name: Found() for chooser in with_oracles}
    report = Report(argparse.Namespace(bench="retrieval", threads=1, json=None))
    for _ in range(2):
        bench_retrieval.measure_text(layers, found, with_oracles, 2)
    bench_retrieval.report_mass(report, Plan(num_texts=2), every, found)
    layer_us = bench_retrieval.report_costs(report, found, layers)

    assert set(layer_us) == {"quest", "auto"}
    rows = [row for row in report.rows if row.metric == "attention_mass" and row.case["what"] == "auto"]
    assert [row.case["budget"] for row in rows] == list(BUDGETS)
    assert all(0 < row.ratio <= 1.001 for row in rows)
    assert {row.baseline for row in rows} == {bench_retrieval.baseline_of(every[0])}
    assert every[0].name == "auto"
    whats = [(row.case["what"], row.case["budget"]) for row in report.rows if row.metric == "attention_mass"]
    assert len(set(whats)) == len(whats)
    assert all(row.value <= 1.001 for row in report.rows if row.metric == "attention_mass")
    report.write()
    table = bench_retrieval.table(found, layer_us, Plan())
    assert all(any(line.startswith(name) for line in table.splitlines()) for name in (*found, Chance().name))


@pytest.mark.slow
def test_floors_hold_on_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    wanted = ["auto", "quest", "arkvale", "louiskv"]
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--threads", "2", "--json", str(path), "--policies", *wanted])
    bench_retrieval.main()

    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    check_rows(rows)

    def value(metric: str, what: str, budget: int) -> float:
        (found,) = [
            row["value"]
            for row in rows
            if row["metric"] == metric and row["case"]["what"] == what and row["case"].get("budget") == budget
        ]
        return float(found)

    assert value("attention_mass", "auto", 512) >= 0.70
    assert value("attention_mass", "quest", 512) >= 0.56
    assert value("attention_mass", "arkvale", 512) >= 0.56
    assert value("attention_mass", "louiskv", 512) >= 0.77
    assert value("needle_coverage", "auto", 256) >= 0.90
    assert value("passkey", "auto", 128) == 1
    assert value("attention_mass", "recent", 512) < value("attention_mass", "quest", 512)
