# SPDX-License-Identifier: Apache-2.0
"""The lines that the demo prints: a table of questions, and the sums under it."""

from __future__ import annotations

from demo_scoring import GOAL, ROWS, Json

SECTIONS = {
    "planted": "Notes that someone typed between the pages; right moment = the first cited one",
    "spoken": "Sentences that someone said; right moment = the first cited one",
    "natural": "Questions about the text itself, in other words; right moment = one of the first three cited",
}
"""Kinds of questions, in the order in which they are asked."""

_QUESTION, _EXPECTED, _ANSWER = 44, 17, 30


def heading() -> str:
    """The line above the table."""
    return _line("question", "expected", "answer", "hit", "moment", "TTFT")


def section(kind: str) -> str:
    """The line above the questions of one kind."""
    return f"- {SECTIONS[kind]}"


def row(question: Json) -> str:
    """The line of one question that was asked."""
    retrieval = question["retrieval"]
    return _line(
        _head(question["question"], _QUESTION),
        _head(question["expected"], _EXPECTED),
        _tail(retrieval["answer"], _ANSWER),
        "hit" if retrieval["is_hit"] else "miss",
        "right" if question["is_moment_found"] else "wrong",
        f"{retrieval['ttft_s']:.2f} s",
    )


def sums(results: Json) -> list[str]:
    """The lines at the end: what was scored, how fast, how large, on what."""
    summary = results["summary"]
    known, natural = summary["num_known"], summary["num_natural"]
    lines = [_scores("right answers", f"{known} with known answers", f"{natural} natural")]
    for key, label in ROWS.items():
        lines.append(
            _scores(f"  {label}", percent(summary["accuracy"][key]), percent(summary["natural_accuracy"][key]))
        )
    found = percent(summary["first_span_right"]), percent(summary["natural_in_three"])
    lines += [_scores("right moment", f"{found[0]} (first cited)", f"{found[1]} (one of three)"), ""]
    return [*lines, *verdict(summary), "", *(f"{name:14}{value}" for name, value in figures(results))]


def verdict(summary: Json) -> list[str]:
    """Say in a sentence or two whether the goal was met."""
    missed = [
        f"Goal missed: {what} in {percent(rate)} of the questions with known answers; wanted are {percent(GOAL)}."
        for what, rate in (
            ("the right answer", summary["accuracy"]["retrieval"]),
            ("the right moment", summary["first_span_right"]),
        )
        if rate is None or rate < GOAL
    ]
    return missed or [f"Goal met: right answers and right moments are both {percent(GOAL)} or more."]


def figures(results: Json) -> list[tuple[str, str]]:
    """Names and values of everything else that was measured."""
    summary, stream, recording, ingest = (results[key] for key in ("summary", "stream", "recording", "ingest"))
    machine, hours = results["machine"], recording["duration_s"] / 3600
    resumed = ", of an interrupted run the last part" if ingest["is_resumed"] else ""
    times = [("recording", recording), (f"reading{resumed}", ingest), ("asking", results["ask"])]
    return [
        ("first token", f"{seconds(summary['disk_ttft_s'])} from disk: {_cold(summary)}"),
        (
            "",
            f"{seconds(summary['prefill_ttft_s'])} if the model reads the same {_whole(summary['prefill_tokens'])} "
            "tokens again as text, without any search",
        ),
        (
            "",
            f"{seconds(summary['whole_prefill_s'])} if it read all {stream['num_tokens']:,} tokens again: an estimate, "
            f"at the {_whole(summary['prefill_tokens_per_s'])} tokens/s of short texts",
        ),
        ("warm before", f"model, preamble, and the index, which took {seconds(results['index_s'])} to read"),
        (
            "disk",
            f"{size(stream['disk_nbytes'])}, {size(stream['disk_nbytes'] / hours)} per hour of video; KV of "
            f"{size(stream['raw_nbytes'])} in {size(stream['extent_nbytes'])}: "
            f"{stream['raw_nbytes'] / stream['extent_nbytes']:.2f} times smaller ({stream['profile']})",
        ),
        (
            "memory, peak",
            f"{size(ingest['peak_rss_nbytes'])} reading, {size(results['ask']['peak_rss_nbytes'])} asking",
        ),
        ("time", "; ".join(f"{name} {seconds(step['wall_s'])}" for name, step in times)),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {size(machine['memory_nbytes'])} of memory"),
        ("model", f"{results['model']}, torch {machine['torch']}, Python {machine['python']}"),
    ]


def percent(rate: float | None) -> str:
    """A share as `94 %`; `-` where nothing was asked."""
    return "-" if rate is None else f"{rate:.0%}".replace("%", " %")


def seconds(value: float | None) -> str:
    """A length of time with as many digits as it deserves."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def size(nbytes: float | None) -> str:
    """Bytes in megabytes or gigabytes, powers of ten."""
    if nbytes is None:
        return "-"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _cold(summary: Json) -> str:
    counted = "" if summary["device_nbytes"] is None else f" (the kernel counted {size(summary['device_nbytes'])})"
    return (
        f"median of the {summary['num_cold']} questions that found no retrieved block in memory; "
        f"each read {size(summary['disk_nbytes'])}{counted}"
    )


def _whole(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _scores(label: str, known: str, natural: str) -> str:
    return f"{label:36}{known:24}{natural}"


def _line(question: str, expected: str, answer: str, hit: str, moment: str, ttft: str) -> str:
    return f"{question:{_QUESTION}}  {expected:{_EXPECTED}}  {answer:{_ANSWER}}  {hit:4}  {moment:6}  {ttft:>6}"


def _head(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"


def _tail(text: str, room: int) -> str:
    """The end of a text: answers repeat the question first and come to the point last."""
    return text if len(text) <= room else f"…{text[1 - room :]}"
