# SPDX-License-Identifier: Apache-2.0
"""Makes one self-contained page of what the demo measured: it needs no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template

from demo_scoring import ROWS, Json, is_right_moment
from demo_table import SECTIONS, figures, percent, seconds, size, verdict
from kvstore.video.prompt import stamp

Thumbnail = Callable[[float, int], str]
"""Time in seconds, width in pixels -> data URI of a picture."""

_STAGES = {
    "retrieve": "search",
    "load": "read from disk",
    "decode": "decode",
    "attend": "read the question, first token",
}
_NUM_FILM = 10
_FILM_WIDTH = 160
_SHOT_WIDTH = 400
_NUM_SHOTS = 3
_NUM_TICKS = 5
_SETTLE_S = 3.0
"""A screen may still be scrolling in during its first seconds."""


def page(results: Json, thumbnail: Thumbnail) -> str:
    """Fill the template.

    Args:
        results: what `results.json` holds.
        thumbnail: makes the pictures.
    """
    duration_s: float = results["recording"]["duration_s"]
    summary, questions = results["summary"], results["questions"]
    longest_s = max(question["retrieval"]["ttft_s"] for question in questions)
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=f"{stamp(duration_s)} of video, answered from disk",
        lead=_lead(results),
        verdict=escape(" ".join(verdict(summary))),
        cards=_cards(results),
        film=_film(duration_s, thumbnail),
        moments="".join(_moment(number, question, duration_s) for number, question in enumerate(questions)),
        axis=_axis(duration_s),
        scores=_scores(summary),
        figures="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in figures(results)),
        questions="".join(_section(kind, results, longest_s, thumbnail) for kind in SECTIONS),
    )


def _lead(results: Json) -> str:
    recording, stream, summary = results["recording"], results["stream"], results["summary"]
    return escape(
        f"A language model ({results['model']}) read what {recording['num_screens']} screens showed and what was said: "
        f"{stream['num_tokens']:,} tokens. Their keys and values went to disk. Another process then asked "
        f"{summary['num_known'] + summary['num_natural']} questions; for each, a few blocks were found, read, decoded "
        "and attended to."
    )


def _cards(results: Json) -> str:
    summary, stream = results["summary"], results["stream"]
    hours = results["recording"]["duration_s"] / 3600
    cards = (
        (percent(summary["accuracy"]["retrieval"]), f"of {summary['num_known']} known answers right"),
        (percent(summary["accuracy"]["streaming_llm"]), "without retrieval"),
        (percent(summary["first_span_right"]), "first cited moment right"),
        (seconds(summary["disk_ttft_s"]), "to the first token, from disk"),
        (seconds(summary["prefill_ttft_s"]), "reading the same passage again"),
        (size(stream["disk_nbytes"] / hours), "on disk per hour of video"),
    )
    return "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in cards
    )


def _film(duration_s: float, thumbnail: Thumbnail) -> str:
    times = [(number + 0.5) * duration_s / _NUM_FILM for number in range(_NUM_FILM)]
    return "".join(f'<img src="{thumbnail(float(int(t)), _FILM_WIDTH)}" alt="screen at {stamp(t)}">' for t in times)


def _moment(number: int, question: Json, duration_s: float) -> str:
    start_s, end_s = question["true_spans"][0]
    kind = "hit" if question["retrieval"]["is_hit"] else "miss"
    label = escape(question["question"], quote=True)
    return (
        f'<a class="{kind}" href="#q{number}" title="{label}" aria-label="{label}" '
        f'style="left:{_share((start_s + end_s) / 2, duration_s)}"></a>'
    )


def _axis(duration_s: float) -> str:
    ticks = (stamp(tick * duration_s / (_NUM_TICKS - 1)) for tick in range(_NUM_TICKS))
    return "".join(f"<span>{tick}</span>" for tick in ticks)


def _scores(summary: Json) -> str:
    rows = [f"<tr><th>The model reads</th><th>{summary['num_known']} known answers</th>"]
    rows[0] += f"<th>{summary['num_natural']} natural questions</th></tr>"
    for key, label in ROWS.items():
        known, natural = percent(summary["accuracy"][key]), percent(summary["natural_accuracy"][key])
        rows.append(f"<tr><td>{escape(label)}</td><td>{known}</td><td>{natural}</td></tr>")
    rows.append(
        f"<tr><td>right moment cited</td><td>{percent(summary['first_span_right'])} (the first one)</td>"
        f"<td>{percent(summary['natural_in_three'])} (one of three)</td></tr>"
    )
    return "".join(rows)


def _section(kind: str, results: Json, longest_s: float, thumbnail: Thumbnail) -> str:
    asked = [(n, question) for n, question in enumerate(results["questions"]) if question["kind"] == kind]
    if not asked:
        return ""
    duration_s = results["recording"]["duration_s"]
    parts = [_question(number, question, duration_s, longest_s, thumbnail) for number, question in asked]
    return f"<h3>{escape(SECTIONS[kind])}</h3>" + "".join(parts)


def _question(number: int, question: Json, duration_s: float, longest_s: float, thumbnail: Thumbnail) -> str:
    retrieval = question["retrieval"]
    answers = [("expected", question["expected"]), ("answer", retrieval["answer"])]
    answers += [(label, question[key]["answer"]) for key, label in ROWS.items() if key != "retrieval"]
    listed = "".join(f"<dt>{escape(label)}</dt><dd>{escape(answer)}</dd>" for label, answer in answers)
    shots = "".join(_shot(span, question, thumbnail) for span in retrieval["spans"][:_NUM_SHOTS])
    return (
        f'<details id="q{number}"{" open" if number == 0 else ""}><summary>'
        f'<span class="words">{escape(question["question"])}</span>'
        f"{_tag(retrieval['is_hit'], 'hit', 'miss')}{_tag(question['is_moment_found'], 'right moment', 'wrong moment')}"
        f'<span class="time">{seconds(retrieval["ttft_s"])}</span></summary><div><dl>{listed}</dl>'
        f'<div class="track">{_marks(question, duration_s)}</div><div class="axis">{_axis(duration_s)}</div>'
        f'<div class="shots">{shots}</div>{_stages(question, longest_s)}</div></details>'
    )


def _tag(is_good: bool, good: str, bad: str) -> str:
    return f'<span class="tag good">✓ {good}</span>' if is_good else f'<span class="tag bad">✗ {bad}</span>'


def _marks(question: Json, duration_s: float) -> str:
    spans = question["retrieval"]["spans"]
    highest = max((span["score"] for span in spans), default=0.0)
    lowest = min((span["score"] for span in spans), default=0.0)
    marks = [
        f'<u title="true moment {stamp(start_s)}" '
        f'style="left:{_share(start_s, duration_s)};width:{_share(end_s - start_s, duration_s)}"></u>'
        for start_s, end_s in question["true_spans"]
    ]
    for span in spans:
        height = 25 + 75 * (span["score"] - lowest) / (highest - lowest) if highest > lowest else 100
        marks.append(
            f'<i class="{"read" if span["is_attended"] else "cited"}" title="{stamp(span["start_s"])}, '
            f'score {span["score"]:.2f}" style="left:{_share(span["start_s"], duration_s)};'
            f'width:{_share(span["end_s"] - span["start_s"], duration_s)};height:{height:.0f}%"></i>'
        )
    return "".join(marks)


def _shot(span: Json, question: Json, thumbnail: Thumbnail) -> str:
    start_s, end_s = span["start_s"], span["end_s"]
    is_right = is_right_moment((start_s, end_s), question["true_spans"])
    picture = thumbnail(min(start_s + _SETTLE_S, (start_s + end_s) / 2), _SHOT_WIDTH)
    notes = [f"{stamp(start_s)} to {stamp(end_s)}", f"score {span['score']:.2f}"]
    notes += ["read by the model"] * span["is_attended"] + ["the true moment"] * is_right
    return (
        f'<figure class="{"right" if is_right else "other"}"><img loading="lazy" src="{picture}" '
        f'alt="screen at {stamp(start_s)}"><figcaption>{", ".join(notes)}</figcaption></figure>'
    )


def _stages(question: Json, longest_s: float) -> str:
    stages, total_s = question["retrieval"]["stages_s"], question["retrieval"]["ttft_s"]
    parts = "".join(f'<span class="{key}" style="width:{_share(stages[key], longest_s)}"></span>' for key in _STAGES)
    keys = "".join(
        f'<span><span class="key {key}"></span>{label} {stages[key] * 1000:.0f} ms</span>'
        for key, label in _STAGES.items()
    )
    nbytes = question["retrieval"]["bytes_read"]
    read = f"{total_s * 1000:.0f} ms to the first token; {size(nbytes['disk'])} read from disk"
    again = f"reading {question['prefill']['num_tokens']} tokens again: {question['prefill']['ttft_s'] * 1000:.0f} ms"
    return f'<div class="bar">{parts}</div><div class="keys">{keys}</div><p class="soft">{read}; {again}</p>'


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f}%"
