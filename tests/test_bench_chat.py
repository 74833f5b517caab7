# SPDX-License-Identifier: Apache-2.0
"""The chat benchmark on a tiny model: what it says of a window that holds everything, and of one that slides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from kvstore.engines.loading import LanguageModel, load_model
from tests.cli_runs import save_tiny_model
from tests.tiny_models import make_model

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_chat
    from harness import check_rows
    from talk import turns as turns_module
    from talk import verdict
    from talk.quarter import Quarter, slope
    from talk.turns import FEWEST_TOKENS, MOST_TOKENS, turns
    from talk.verdict import faults


def test_rows_of_a_short_chat_have_their_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokenizer = tmp_path / "rows.json", load_model(save_tiny_model(tmp_path / "model"), tmp_path).tokenizer
    monkeypatch.setattr(bench_chat, "load", lambda _: LanguageModel(make_model(), tokenizer, Path("tiny")))
    monkeypatch.setattr(bench_chat, "SAMPLE_EVERY", 2)
    monkeypatch.setattr(bench_chat, "REPLY_TOKENS", 3)
    monkeypatch.setattr(verdict, "LEAST_PRINTABLE", 0.0)  # a random model says anything
    monkeypatch.setattr(bench_chat, "QUARTER_S", 100.0)  # 1,000 tokens: what the window holds
    for name, value in (("FEWEST_TOKENS", 200), ("MOST_TOKENS", 300), ("TELL_EVERY", 2), ("ASK_AFTER", 2)):
        monkeypatch.setattr(turns_module, name, value)
    arguments = ["--hours", "0.06", "--threads", "1", "--json", str(path), "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--policies", "streaming_llm", "maxsim"])

    bench_chat.main()

    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    check_rows(rows)
    halves = {
        (row["case"]["policy"], row["case"]["quarter"], row["case"]["what"]): row["value"]
        for row in rows
        if row["metric"] == "second halves"
    }
    quarters = [quarter for name, quarter, what in halves if name == "streaming_llm" and what == "fresh window"]
    assert quarters == [1, 2]
    for quarter in quarters:
        fresh, window, back = (
            halves["streaming_llm", quarter, what]
            for what in ("fresh window", "sinks and window", "with streaming_llm")
        )
        assert back == pytest.approx(window, rel=2e-3), "it brings nothing back"
        assert quarter > 1 or fresh == pytest.approx(window, rel=2e-3), "nothing has left the window"
    assert {row["case"]["policy"] for row in rows if row["metric"] == "remembered"} == {"streaming_llm", "maxsim"}
    last = max(row["case"]["quarter"] for row in rows if row["metric"] == "disk")
    grown = [row["ratio"] for row in rows if row["metric"] == "disk" and row["case"]["quarter"] == last]
    assert all(ratio >= 1 for ratio in grown)
    assert max(grown) > 1


def test_passages_are_of_all_texts_and_questions_follow_their_notes() -> None:
    told: list[str] = []
    for number, turn in enumerate(turns(lambda text: [ord(sign) for sign in text])):
        words = "".join(map(chr, turn.ids))
        length = turn.text.stop - turn.text.start
        assert FEWEST_TOKENS <= length <= MOST_TOKENS or turn.accept
        assert words.endswith("<|im_start|>assistant\n")
        assert words.startswith("<|im_start|>user\n") == (number == 0)
        if turn.accept:
            assert any(turn.accept[0] in note for note in told)
        elif "\nNote: " in words:
            told.append(words)
        if number > 60:
            break
    assert len(told) > 3


def test_growth_is_that_of_a_line_and_repetitions_are_seen() -> None:
    times = [900.0 * quarter for quarter in range(5)]
    assert slope(times, [7 + time / 1800 for time in times]) == pytest.approx(2)
    assert slope(times[:1], [3.0]) == 0
    quarter = Quarter(replies=["a b c d", "a a a a"])
    assert quarter.distinct == pytest.approx((1 + 0.25) / 2)
    assert Quarter(replies=["ab\n", "\x00"]).printable == pytest.approx(3 / 4)


def _good(memory_mib: float = 100.0) -> Quarter:
    return Quarter(
        times_s=[1.0],
        memory_mib=[memory_mib],
        disk_mib=[1.0],
        said=[1.0],
        halves=[(1.0, 1.05, 0.9)],
        replies=["so it goes", "yes\n"],
    )


def test_a_chat_that_goes_on_as_it_began_has_no_faults() -> None:
    assert faults([_good(50), _good(), _good(104), _good(96)]) == []
    assert faults([_good()]) == []


@pytest.mark.parametrize(
    ("quarter", "fault"),
    [
        (_good(106), "quarter 3: 106 MiB of memory, after 100"),
        (replace(_good(), replies=["\x00\x01 a", "b"]), "can be printed"),
        (replace(_good(), replies=["no no no no no"]), "no repetition"),
        (replace(_good(), halves=[(1.0, 1.2, 1.0)]), "from a fresh window"),
    ],
)
def test_what_a_long_chat_must_not_do_is_a_fault(quarter: Quarter, fault: str) -> None:
    (found,) = faults([_good(), _good(), quarter])
    assert fault in found
