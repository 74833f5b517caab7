# SPDX-License-Identifier: Apache-2.0
"""The benchmark of first questions on a tiny model: its rows have their baselines, and its own check holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.tiny_models import language_model_of, token_ids

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_first_question
    import harness


def test_what_is_kept_is_compared_with_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    monkeypatch.setattr(bench_first_question, "load", lambda _: language_model_of())
    monkeypatch.setattr(bench_first_question, "text_ids", lambda _, count: token_ids(count)[0].tolist())
    monkeypatch.setattr(harness, "MIN_ITERATIONS", 2)
    monkeypatch.setattr(harness, "MIN_S", 0.0)
    arguments = ["--tokens", "1152", "--threads", "1", "--json", str(path), "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--policies", "quest"])

    bench_first_question.main()

    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    harness.check_rows(rows)
    assert {(row["case"]["what"], row["case"]["clock"]) for row in rows} == {
        (what, clock) for what in ("kept", "keys") for clock in ("wall", "cpu")
    }
    assert all(row["case"]["tokens"] == 1152 for row in rows)
