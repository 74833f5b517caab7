# SPDX-License-Identifier: Apache-2.0
"""The questions benchmark: its retriever finds by rare words and times, and every row of a run has its baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

for _module in ("av", "transformers"):
    pytest.importorskip(_module)

import kvstore  # noqa: E402
from kvstore.engines.anatomy import spec_of  # noqa: E402
from kvstore.engines.loading import LanguageModel, load_model  # noqa: E402
from kvstore.spec import BlockKey  # noqa: E402
from kvstore.store import Entry  # noqa: E402
from kvstore.video.prompt import PREAMBLE  # noqa: E402
from tests.cli_runs import save_tiny_model  # noqa: E402

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_questions
    from asking.truth import Line, Recording, spread
    from asking.word_vectors import WordVectors
    from harness import check_rows

SCREENS = ["The statement binds names.\n\nNote: the door is 4410.", "The list is sorted.", "Names are the list."]


def record(folder: Path, language_model: LanguageModel) -> None:
    """What `make demo` leaves: a stream of three screens, and their truth."""
    model: torch.nn.Module = language_model.model
    with (
        kvstore.open(folder / "store", spec_of(model), block_tokens=8, host_nbytes=1 << 20) as store,
        kvstore.attach(language_model.model, store.stream("reading", window_tokens=64)) as attached,
        torch.no_grad(),
    ):
        model(torch.tensor([language_model.encode(PREAMBLE)]))
        attached.session.commit(partial=True)
        for number, text in enumerate(SCREENS):
            ids = language_model.encode(text)[:24]
            for _ in range(0, len(ids), 8):
                attached.session.segment(min(8, len(ids)), 10.0 * number, 10.0 * number + 9, number)
            model(torch.tensor([ids[: len(ids) // 8 * 8]]))
    fact: dict[str, Any] = {"question": "What is the door?", "answer": "4410", "accept": [], "spans": [[0, 9]]}
    fact |= {"kind": "planted", "sentence": "Note: the door is 4410."}
    screens = [{"start_s": 10 * n, "end_s": 10 * n + 9, "text": text} for n, text in enumerate(SCREENS)]
    truth = {"facts": [fact], "natural": [fact | {"kind": "natural"}], "screens": screens}
    (folder / "reading.json").write_text(json.dumps(truth), encoding="utf-8")


def test_every_row_has_its_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(save_tiny_model(tmp_path / "model"), tmp_path)
    record(tmp_path, loaded)
    path, plot = tmp_path / "rows.json", tmp_path / "plot.svg"
    monkeypatch.setattr(bench_questions, "load", lambda _: loaded)
    monkeypatch.setattr(bench_questions, "read_passages", lambda *_: 0.5)  # a random model answers nothing
    arguments = ["--folder", str(tmp_path), "--threads", "1", "--json", str(path), "--plot", str(plot)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--policies", "auto", "auto-kept", "streaming_llm"])

    bench_questions.main()

    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    check_rows(rows)
    found = {
        (row["case"]["what"], row["case"]["external"]): row["value"]
        for row in rows
        if row["metric"] == "right moments" and row["case"]["what"] != "all questions"
    }
    helped = {("auto", True), ("auto-kept", True), ("external alone", True)}
    assert set(found) == helped | {("auto", False), ("auto-kept", False), ("streaming_llm", False)}
    assert found["external alone", True] == 1
    assert plot.read_text(encoding="utf-8").count("<rect") == 1 + 2 * 4


def test_words_find_the_blocks_of_their_time() -> None:
    lines = [Line(10.0 * number, 10.0 * number + 9, text) for number, text in enumerate(SCREENS)]
    places = [(0.0, 0.0, -1), (0.0, 9.0, 0), (0.0, 9.0, 0), (10.0, 19.0, 1), (20.0, 29.0, 2)]
    entries = [
        Entry(number, BlockKey(bytes(31) + bytes([number])), 8 * number, 8, start_s, end_s, group)
        for number, (start_s, end_s, group) in enumerate(places)
    ]
    words = WordVectors(lines, entries)
    (scores,) = words.scores("Which door?")
    assert scores.scores.tolist()[0] == -torch.inf, "the preamble is in no transcript"
    assert scores.scores[1] == scores.scores[2] == scores.scores.max() > 0
    assert scores.scores[3:].tolist() == [0, 0]
    assert words.scores("Quoth ravens?") == []


def test_some_of_the_questions_are_spread_over_all(tmp_path: Path) -> None:
    assert spread(list(range(48)), 12) == list(range(0, 48, 4))  # type: ignore[arg-type, comparison-overlap]
    assert spread([], 3) == []
    with pytest.raises(SystemExit, match="make demo"):
        Recording.of(tmp_path)
