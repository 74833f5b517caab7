# SPDX-License-Identifier: Apache-2.0
"""kvstore/cli: arguments, how numbers are written, the progress bar, and answers that need no heavy import."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvstore
from kvstore.cli import arguments, text
from kvstore.cli.main import main
from kvstore.cli.progress import Progress

ROOT = Path(kvstore.__file__).parents[1]
HEAVY = ("av", "lmdb", "numpy", "torch", "transformers")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("word", "nbytes"),
    [
        ("1", 1),
        ("1e9", 10**9),
        ("1.5e3", 1500),
        ("512MB", 512 * 10**6),
        ("200GiB", 200 << 30),
        ("0.5KiB", 512),
        ("64k", 64 << 10),
        (" 2 tib ", 2 << 40),
        ("10B", 10),
    ],
)
def test_sizes_are_read_in_the_usual_ways(word: str, nbytes: int) -> None:
    assert arguments.size(word) == nbytes


@pytest.mark.parametrize("word", ["", "GiB", "-1", "0", "1.2.3", "5 bits", "1KKB", "nan", "inf", "1e30", "1e999", "٣"])
def test_what_is_no_size_is_refused(word: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"is not a size|out of range"):
        arguments.size(word)


@given(st.integers(1, 1 << 50))
def test_a_written_size_is_read_back_within_its_precision(nbytes: int) -> None:
    assert arguments.size(text.size(nbytes)) == pytest.approx(nbytes, rel=0.06)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["ingest"],
        ["ingest", "v.mp4", "--store", "", "--stream", "s"],
        ["ingest", "v.mp4", "--store", "x" * 300, "--stream", "s"],
        ["ingest", "v.mp4", "--store", "x", "--stream", " "],
        ["ingest", "v.mp4", "--store", "x", "--stream", "s", "--fps", "0"],
        ["ingest", "v.mp4", "--store", "x", "--stream", "s", "--fps", "nan"],
        ["ingest", "v.mp4", "--store", "x", "--stream", "s", "--disk", "lots"],
        ["ingest", "v.mp4", "--store", "x", "--stream", "s", "--profile", "mp3"],
        ["ask", "", "--store", "x", "--stream", "s"],
        ["ask", "\udcff", "--store", "x", "--stream", "s"],
        ["ask", "why?", "--store", "x", "--stream", "s", "--budget", "0"],
        ["inspect", "--store", "x", "--stream", "s", "--block", "-1"],
        ["rm", "--store", "x"],
    ],
)
def test_bad_arguments_exit_with_two_and_say_which(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--help"], ["ingest", "--help"], ["ask", "--store", "x"], ["ls"], ["verify", "--store", ""]]
)
def test_help_and_bad_arguments_answer_without_heavy_imports(argv: list[str]) -> None:
    script = (
        "import json, sys\n"
        "from kvstore.cli.main import main\n"
        "try:\n"
        "    main(json.loads(sys.argv[1]))\n"
        "except SystemExit:\n"
        f"    print('imported:', *(name for name in {HEAVY!r} if name in sys.modules))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, json.dumps(argv)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "imported:"


def test_ctrl_c_while_the_commands_are_imported_ends_with_one_line() -> None:
    script = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'kvstore.cli.ask':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from kvstore.cli.main import main\n"
        "sys.exit(main(['ls']))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (130, "kvstore: interrupted\n")


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB")],
)
def test_sizes_are_written_in_the_largest_unit(nbytes: int, words: str) -> None:
    assert text.size(nbytes) == words


@pytest.mark.parametrize("seconds", [None, "1", float("nan"), float("inf"), -1.0])
def test_what_is_no_length_of_time_is_a_dash(seconds: object) -> None:
    assert text.duration(seconds) == "-"


def test_times_are_written_with_hours() -> None:
    assert text.duration(7384.9) == "2:03:04"
    assert text.span(0.0, 61.0) == "0:00:00-0:01:01"


def test_text_for_the_terminal_holds_no_escapes_and_no_broken_unicode() -> None:
    assert text.printable("a\x1b[2J\n\udcff ü") == "a\\x1b[2J\\n\\udcff ü"


def test_table_columns_line_up() -> None:
    assert text.table(("name", "size"), [("a", "1"), ("longer", "200")]) == [
        "name    size",
        "a          1",
        "longer   200",
    ]


def test_progress_redraws_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    times = iter([0.0, 0.01, 1.0])
    with Progress(stream, lambda: next(times)) as progress:
        for fraction in (0.1, 0.2, 0.5):
            progress.show(fraction, [f"{fraction} done"])
    first, second = stream.getvalue().removeprefix("\r\x1b[K").split("\r\x1b[K")
    assert first == "[##..................]  10%  0.1 done"
    assert second == "[##########..........]  50%  0.5 done\n"


def test_progress_never_wraps_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    with Progress(stream) as progress:
        progress.show(0.5, ["0:00:10/0:00:20", "12 tokens/s"])
    assert stream.getvalue() == "\r\x1b[K0:00:10/0:00:20  12\n"


def test_progress_writes_a_line_now_and_then_elsewhere() -> None:
    stream = io.StringIO()
    times = iter([0.0, 5.0, 10.0, 12.0])
    with Progress(stream, lambda: next(times)) as progress:
        progress.note("not worth a line")
        for done in range(4):
            progress.show(None, [f"{done} blocks"])
    assert stream.getvalue() == "0 blocks\n2 blocks\n3 blocks\n", "the last state is always left"


def test_a_note_leaves_no_trace_on_a_terminal() -> None:
    stream = Terminal()
    with Progress(stream) as progress:
        progress.note("loading")
    assert stream.getvalue().endswith("loading\r\x1b[K")
