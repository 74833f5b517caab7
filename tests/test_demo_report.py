# SPDX-License-Identifier: Apache-2.0
"""What the worked example makes of its measurements: scores, passages, sums, and a page that stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

EXAMPLES = Path(__file__).parents[1] / "examples"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(EXAMPLES))
    from demo_passages import block_around, tokens_from
    from demo_scoring import ROWS, is_hit, is_moment_found, is_right_moment, mark_cold, summarise
    from demo_steps import digest_of, drop_page_cache
    from demo_table import heading, row, sums, verdict
    from report import page

Json = dict[str, Any]
VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = '<script src="https://example.org/x.js"></script>&"'


def question(kind: str = "planted", **changes: Any) -> Json:
    retrieval = {
        "answer": "It is 7316.",
        "spans": [
            {"start_s": 60.0, "end_s": 90.0, "score": 5.0, "is_attended": True, "group": 2, "first_token": 9},
            {"start_s": 0.0, "end_s": 30.0, "score": -1.0, "is_attended": False, "group": 0, "first_token": 0},
        ],
        "ttft_s": 0.2,
        "stages_s": {"retrieve": 0.1, "load": 0.02, "decode": 0.03, "attend": 0.05},
        "bytes_read": {"device": 100, "host": 0, "disk": 2_000_000},
        "is_hit": True,
    }
    asked: Json = {
        "kind": kind,
        "question": "What is the access code?",
        "expected": "7316",
        "accept": [],
        "sentence": "Note: the access code is 7316.",
        "true_spans": [[60, 90]],
        "retrieval": retrieval,
        "device_nbytes": 2_000_000,
        "is_moment_found": True,
        "prefill": {"num_tokens": 250, "ttft_s": 0.5},
        "is_cold": True,
    }
    for source in ROWS.keys() - {"retrieval"}:
        asked[source] = {"answer": "I do not know.", "is_hit": False}
    return asked | changes


def results(questions: list[Json]) -> Json:
    return {
        "recording": {"duration_s": 7200, "num_screens": 240, "wall_s": 60.0},
        "ingest": {"wall_s": 200.0, "peak_rss_nbytes": 10**9, "is_resumed": False},
        "ask": {"wall_s": 100.0, "peak_rss_nbytes": 10**9},
        "machine": {"cpu": "CPU", "cores": 2, "memory_nbytes": 8 * 10**9, "torch": "2", "python": "3"},
        "model": "model",
        "index_s": 1.0,
        "stream": {
            "num_tokens": 60_000,
            "raw_nbytes": 3 * 10**9,
            "extent_nbytes": 2 * 10**9,
            "disk_nbytes": 2 * 10**9,
            "profile": "lossless",
        },
        "summary": summarise(questions, 60_000),
        "questions": questions,
    }


class Reader(HTMLParser):
    """Fails on a tag that is not closed in its place; keeps what could refer to something outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def picture(time_s: float, width: int) -> str:
    return f"data:image/jpeg;base64,{width}"


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        ("The code is 7316.", ["7316"], True),
        ("The code is 73160.", ["7316"], False),
        ("It costs 4,700 dollars.", ["4700 dollars", "4,700"], True),
        ("HELENA\n marsh", ["Helena Marsh"], True),
        ("Marshall", ["Helena Marsh", "Marsh"], False),
        ('The prompt is "(Pdb)".', ["(Pdb)"], True),
        ("with python -O", ["-O"], True),
        ("", ["7316"], False),
    ],
)
def test_a_hit_is_a_whole_word_in_any_case(answer: str, wanted: list[str], expected: bool) -> None:
    assert is_hit(answer, wanted) is expected


@given(st.text(max_size=20), st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8))
def test_an_answer_that_says_the_wording_is_a_hit(before: str, wording: str) -> None:
    assert is_hit(f"{before} {wording}.", [wording])


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ((60, 90), True),
        ((70, 80), True),
        ((0, 200), True),
        ((30, 60), False),
        ((90, 120), False),
        ((85, 115), False),
        ((65, 95), True),
    ],
)
def test_spans_that_only_touch_are_not_the_same_moment(span: tuple[float, float], expected: bool) -> None:
    assert is_right_moment(span, [(500, 530), (60, 90)]) is expected


def test_the_first_span_counts_and_for_natural_questions_the_first_three() -> None:
    second = {"true_spans": [[0, 30]]}
    assert not is_moment_found(question("planted", **second))
    assert is_moment_found(question("natural", **second))


def test_only_questions_that_found_nothing_in_memory_are_cold() -> None:
    asked = [question() for _ in range(4)]
    for one, nbytes in zip(asked, [(100, 0, 9), (130, 0, 9), (100, 7, 9), (100, 0, 0)], strict=True):
        one["retrieval"]["bytes_read"] = dict(zip(("device", "host", "disk"), nbytes, strict=True))
    mark_cold(asked)
    assert [one["is_cold"] for one in asked] == [True, False, False, False]


def test_medians_are_taken_over_cold_questions_and_rates_over_known_answers() -> None:
    warm = question("spoken", is_cold=False, prefill={"num_tokens": 250, "ttft_s": 50.0}, is_moment_found=False)
    warm["retrieval"] |= {"ttft_s": 0.001, "is_hit": False}
    summary = summarise([question(), warm, question("natural")], 60_000)
    assert (summary["num_known"], summary["num_natural"], summary["num_cold"]) == (2, 1, 2)
    assert summary["accuracy"]["retrieval"] == summary["first_span_right"] == 0.5
    assert (summary["disk_ttft_s"], summary["prefill_ttft_s"]) == (0.2, 0.5)
    assert summary["whole_prefill_s"] == pytest.approx(120)


def test_what_was_not_asked_has_no_rate() -> None:
    summary = summarise([question(is_cold=False)], 60_000)
    assert summary["natural_in_three"] is None
    assert summary["disk_ttft_s"] is None
    assert any("-" in line for line in sums(results([question(is_cold=False)])))


@pytest.mark.parametrize("max_tokens", [6, 9, 500])
def test_a_passage_holds_its_sentence_and_no_more_than_a_block(max_tokens: int) -> None:
    screens = [
        {"start_s": 60, "end_s": 90, "text": f"{'before ' * 30}\n\nNote: the access\ncode is 7316. {'after ' * 9}"}
    ]
    passage = block_around(question(), screens, lambda text: [0] * len(text.split()), max_tokens)
    assert "Note: the access code is 7316." in passage
    assert len(passage.split()) == min(max_tokens, 45)


def test_context_starts_at_the_cited_screen_and_runs_on() -> None:
    screens = [{"start_s": 30 * n, "end_s": 30 * n + 30, "text": str(n)} for n in range(4)]
    assert tokens_from(60, screens, lambda text: [int(text)] * 3, 5) == [2, 2, 2, 3, 3]
    assert tokens_from(90, screens, lambda text: [int(text)] * 3, 5) == [3, 3, 3]


def test_the_goal_is_said_to_be_missed_when_it_is() -> None:
    right, wrong = question(), question(is_moment_found=False)
    wrong["retrieval"]["is_hit"] = False
    assert verdict(summarise([right], 1)) == verdict(summarise([right] * 4 + [wrong], 1))
    missed = verdict(summarise([right, wrong], 1))
    assert [line.startswith("Goal missed") and "50 %" in line for line in missed] == [True, True]


def test_lines_of_the_table_are_equally_wide() -> None:
    long = question(question="why " * 40, expected="because " * 9)
    long["retrieval"]["answer"] = f"{'because ' * 20}of 7316."
    assert len(heading()) == len(row(question())) == len(row(long))
    assert "of 7316." in row(long)


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    reader = read(page(results([question(), question("spoken"), question("natural")]), picture))
    assert reader.values("src")
    assert all(value.startswith("data:image/jpeg;base64,") for value in reader.values("src"))
    assert {tag for tag, name, _ in reader.attributes if name == "href"} == {"a"}
    assert (
        sorted(reader.values("href")) == [f"#{name}" for name in sorted(reader.values("id"))] == ["#q0", "#q1", "#q2"]
    )
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)


def test_the_template_names_no_address() -> None:
    template = (EXAMPLES / "report_template.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link", template)


def test_texts_are_escaped() -> None:
    nasty = question(question=NASTY, expected=NASTY)
    nasty["retrieval"]["answer"] = nasty["oracle"]["answer"] = NASTY
    html = page(results([nasty]) | {"model": NASTY}, picture)
    read(html)
    assert "<script" not in html
    assert html.count("&lt;script") >= 5


def test_a_question_without_spans_still_has_its_place() -> None:
    empty = question(is_moment_found=False)
    empty["retrieval"]["spans"] = []
    assert "wrong moment" in page(results([empty]), picture)


def test_equal_sources_and_settings_share_a_digest(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("1")
    first = digest_of([source], ["numpy", "no-such-package"], [2.1, 0])
    assert first == digest_of([source], ["numpy", "no-such-package"], [2.1, 0])
    assert first != digest_of([source], ["numpy", "no-such-package"], [2.1, 1])
    source.write_text("2")
    assert first != digest_of([source], ["numpy", "no-such-package"], [2.1, 0])


def test_dropping_the_page_cache_keeps_the_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "extent"
    file.write_text(json.dumps([1, 2]))
    drop_page_cache(tmp_path)
    assert json.loads(file.read_text()) == [1, 2]
