# SPDX-License-Identifier: Apache-2.0
"""The commands that keep a store in order: what they print, how they end, and that a store comes back from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.cli.main import main
from tests.store_blocks import EXTENT_NBYTES, HEADER, block_key, make_blocks, make_slot, open_store

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with open_store(tmp_path / "store") as store:
        store.put([block_key(number) for number in range(100, 110)], [make_slot(n) for n in range(100, 110)], [40] * 10)
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(5), {"next": 5})
        store.flush()
        store.remove([block_key(number) for number in range(100, 110)])
    return tmp_path / "store"


def test_verify_says_where_every_byte_is(folder: Path, command: Command) -> None:
    code, out, _ = command("verify", "--store", folder)
    assert code == 0
    assert f"extent files: {15 * EXTENT_NBYTES:,} bytes = " in out
    assert f"{10 * EXTENT_NBYTES:,} free" in out
    _, out, _ = command("verify", "--store", folder, "--json")
    account = json.loads(out)["bytes"]
    assert account["file_nbytes"] == sum(nbytes for name, nbytes in account.items() if name != "file_nbytes")


def test_compact_shortens_the_files(folder: Path, command: Command) -> None:
    code, out, _ = command("compact", "--store", folder)
    assert (code, out) == (0, "240.0 KiB freed, 120.0 KiB left: 5 blocks moved, 120.0 KiB\n")
    code, out, _ = command("compact", "--store", folder, "--json")
    assert (code, json.loads(out)["moved_blocks"]) == (0, 0)


def test_a_damaged_stream_is_repaired_and_comes_back_from_its_export(folder: Path, command: Command) -> None:
    backup = folder.parent / "lecture.kvx"
    code, out, _ = command("export", "--store", folder, "--stream", "lecture", backup)
    assert code == 0
    assert "exported lecture: 5 blocks" in out
    assert command("repair", "--store", folder)[:2] == (0, "nothing to repair: 5 blocks read\n")

    with (folder / "extents" / "00000000.extents").open("r+b") as file:
        file.seek(12 * EXTENT_NBYTES + 1000)
        file.write(bytes(100))
    assert command("verify", "--store", folder)[0] == 1
    code, out, _ = command("repair", "--store", folder)
    assert code == 1
    assert "lost: stream lecture, block 2" in out
    assert "1 block dropped, 1 lost by streams: 5 blocks read" in out
    assert json.loads(command("repair", "--store", folder, "--json")[1])["lost"] == [{"stream": "lecture", "index": 2}]
    code, out, _ = command("export", "--store", folder, "--stream", "lecture", folder.parent / "partial.kvx")
    assert (code, "missing: block" in out) == (1, True)

    code, out, _ = command("import", "--store", folder, backup)
    assert code == 0
    assert "is whole again: lecture: 5 blocks" in out
    assert command("verify", "--store", folder)[0] == 0


def test_import_makes_a_store_and_gives_the_stream_a_name(folder: Path, command: Command) -> None:
    backup, other = folder.parent / "lecture.kvx", folder.parent / "other"
    command("export", "--store", folder, "--stream", "lecture", backup)
    code, out, _ = command("import", "--store", other, "--stream", "copy", backup)
    assert code == 0
    assert out.startswith("imported copy: 5 blocks")
    assert command("verify", "--store", other, "--stream", "copy")[0] == 0


@pytest.mark.parametrize("words", [["repair"], ["compact"], ["export", "--stream", "s", "file"]])
def test_where_there_is_no_store_none_is_made(tmp_path: Path, command: Command, words: list[str]) -> None:
    code, _, err = command(words[0], "--store", tmp_path / "none", *words[1:])
    assert code == 2
    assert "no store here" in err
    assert not (tmp_path / "none").exists()


def test_a_file_that_is_no_export_is_an_error_in_one_line(folder: Path, command: Command) -> None:
    (folder.parent / "file").write_bytes(b"something else")
    code, _, err = command("import", "--store", folder, folder.parent / "file")
    assert code == 2
    assert "not an exported stream" in err
    assert command("export", "--store", folder, "--stream", "other", folder.parent / "file")[0] == 2
    assert (folder.parent / "file").read_bytes() == b"something else"
