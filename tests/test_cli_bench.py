# SPDX-License-Identifier: Apache-2.0
"""`kvstore bench` and the benchmarks' report: scripts are found and run by name, and every row can be checked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli import bench
from kvstore.cli.main import main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    from harness import Report, Timing, check_rows

FIELDS = {"bench", "case", "metric", "value", "unit", "baseline", "ratio"}


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks: one that notes its arguments and ends with code 3."""
    monkeypatch.setattr(bench, "_FOLDER", tmp_path)
    notes = tmp_path / "notes.json"
    text = f"import json, sys\njson.dump(sys.argv[1:], open({str(notes)!r}, 'w'))\nsys.exit(3)\n"
    (tmp_path / "bench_two_words.py").write_text(text)
    (tmp_path / "harness.py").touch()
    return notes


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(argparse.Namespace(bench="none", threads=1, json=tmp_path / "made" / "rows.json"), {"origin": "here"})


def test_arguments_go_to_the_script_and_its_exit_code_comes_back(scripts: Path) -> None:
    assert main(["bench", "two-words", "--json", "rows.json", "--help"]) == 3

    assert json.loads(scripts.read_text()) == ["--json", "rows.json", "--help"]


def test_an_unknown_benchmark_is_refused_with_those_there_are(
    scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "nothing"]) == 2

    assert capsys.readouterr().err == "kvstore: error: there is no benchmark 'nothing': choose from two-words\n"
    assert not scripts.exists()


def test_without_a_source_tree_it_says_where_benchmarks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_FOLDER", tmp_path / "absent")

    assert main(["bench", "codec"]) == 2

    assert "source tree" in capsys.readouterr().err


def test_a_folder_of_another_package_is_no_source_tree(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scripts.parent / "harness.py").unlink()

    assert main(["bench", "two-words"]) == 2

    assert "source tree" in capsys.readouterr().err
    assert not scripts.exists()


def test_without_a_name_it_lists_those_there_are(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2

    assert capsys.readouterr().err == "kvstore: error: which benchmark? Choose from two-words\n"


def test_the_tree_has_the_promised_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "nothing"])

    found = capsys.readouterr().err.rpartition("choose from ")[2].strip()
    promised = (
        "append codec decode device-decode eviction hit-rates io objects profiles quality remote retrieval "
        "session shapes"
    )
    assert set(promised.split()) <= set(found.split(", "))


def test_rows_carry_their_baseline_and_the_ratio_to_it(report: Report) -> None:
    slow, fast = (Timing(seconds, seconds, seconds, 30) for seconds in (2.0, 0.5))
    report.rate("copy", 4.0, "GB/s", ("ours", fast), ("plain", slow), place="memory")
    report.latency("copy", ("ours", fast), ("plain", slow), place="memory")
    report.value("loss", "nats", ("ours", 0.001), ("promise", 0.002))
    report.write()

    written = json.loads((report.options.json).read_text())

    assert set(written) == {"machine", "commit", "rows"}
    assert all(set(row) == FIELDS for row in written["rows"])
    found = {
        (row["case"]["what"], row["unit"]): (row["value"], row["baseline"], row["ratio"]) for row in written["rows"]
    }
    assert found == {
        ("plain", "GB/s"): (2.0, "plain", 1.0),
        ("ours", "GB/s"): (8.0, "plain", 4.0),
        ("plain", "us"): (2e6, "plain", 1.0),
        ("ours", "us"): (5e5, "plain", 0.25),
        ("promise", "nats"): (0.002, "promise", 1.0),
        ("ours", "nats"): (0.001, "promise", 0.5),
    }
    assert written["rows"][1]["case"] == {"what": "ours", "threads": 1, "origin": "here", "place": "memory"}


def test_a_row_without_its_baseline_or_with_another_ratio_is_noticed() -> None:
    limit: dict[str, Any] = {"bench": "b", "case": {"what": "limit"}, "metric": "m", "value": 4.0, "unit": "u"}
    limit |= {"baseline": "limit", "ratio": 1.0}
    row = {**limit, "case": {"what": "ours"}, "value": 2.0, "ratio": 0.5}

    check_rows([limit, row])
    with pytest.raises(SystemExit, match="no row of the baseline"):
        check_rows([row])
    with pytest.raises(SystemExit, match="not the ratio"):
        check_rows([limit, {**row, "ratio": 2.0}])


@pytest.mark.parametrize(
    "path", sorted(BENCHMARKS.glob("results/*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_committed_results_can_be_checked(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))

    assert set(found) == {"machine", "commit", "rows"}
    assert all(set(row) == FIELDS and row["bench"] == path.stem for row in found["rows"])
    check_rows(found["rows"])
