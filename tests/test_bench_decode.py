# SPDX-License-Identifier: Apache-2.0
"""The benchmark of decoding with retrieval, on a tiny model: every row has its baseline, and shares are shares."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from kvstore.engines.loading import LanguageModel
from tests.tiny_models import make_model, token_ids

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_decode
    from harness import Report, check_rows


@pytest.mark.parametrize("passes", [1, 2])
def test_every_row_of_an_answer_has_its_baseline(passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "text_ids", lambda _, count: token_ids(count)[0].tolist())
    policies = ["auto", "maxsim"][:passes]  # maxsim cannot do without the first of two
    settings = argparse.Namespace(
        bench="decode", threads=1, json=None, folder=tmp_path, policies=policies, passes=passes, budget=[64]
    )
    report = Report(settings)
    language_model = LanguageModel(make_model(), None, Path("tiny"))

    bench_decode.run_all(report, language_model, settings, num_tokens=768, num_questions=2)

    check_rows([asdict(row) for row in report.rows])
    found = {(row.metric, row.case["what"], row.case.get("policy"), row.case.get("clock")): row for row in report.rows}
    for clock in bench_decode.CLOCKS:
        assert found["decode", "auto", None, clock].baseline == "streaming_llm"
        assert 0 < found["selection", "selection", "auto", clock].ratio < 1
        if passes == 2:
            assert found["selection", "selection", "maxsim", clock].value == 0, "it has no layers that choose"
    assert 0 < found["hit_rate", "auto", None, None].value <= 1
