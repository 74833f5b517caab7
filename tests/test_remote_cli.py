# SPDX-License-Identifier: Apache-2.0
"""`kvstore push` and `kvstore pull`, as people run them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.cli.main import main
from kvstore.store import Access
from tests.remote_servers import RedisServer, redis_server
from tests.store_blocks import HEADER, make_blocks, open_store


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def lecture(tmp_path: Path) -> Path:
    """A store with a stream of five blocks."""
    with open_store(tmp_path / "a") as store:
        store.create_stream(HEADER)
        store.append("lecture", make_blocks(5), {"is_complete": True})
    return tmp_path / "a"


def run(verb: str, store: Path, remote: str, stream: str = "lecture") -> int:
    return main([verb, "--store", str(store), "--stream", stream, "--remote", remote])


def test_a_stream_is_pushed_and_pulled(
    lecture: Path, tmp_path: Path, redis: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("push", lecture, redis.address) == 0
    assert "pushed lecture" in (out := capsys.readouterr().out)
    assert "5 blocks moved" in out
    assert run("pull", tmp_path / "b", redis.address) == 0
    assert "pulled lecture" in (out := capsys.readouterr().out)
    assert "5 blocks moved" in out
    with open_store(tmp_path / "b", Access.READ) as store:
        assert len(store.manifest("lecture").entries) == 5
        assert store.verify().is_clean
    assert run("pull", tmp_path / "b", redis.address) == 0
    assert "0 blocks moved" in capsys.readouterr().out


def test_errors_name_the_cause_and_leave_no_store_behind(
    lecture: Path, tmp_path: Path, redis: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb, store, remote, stream, word in (
        ("pull", tmp_path / "b", redis.address, "lecture", "nobody has pushed"),
        ("push", lecture, redis.address, "other", "no stream 'other'"),
        ("push", tmp_path / "b", redis.address, "lecture", "no store"),
        ("push", lecture, "redis://127.0.0.1:1/x", "lecture", "refused"),
        ("pull", tmp_path / "b", "http://host/x", "lecture", "scheme"),
        ("pull", tmp_path / "b", "redis://host", "lecture", "namespace"),
    ):
        assert run(verb, store, remote, stream) == 2
        caught = capsys.readouterr()
        assert caught.err.startswith("kvstore: error: ")
        assert caught.err.count("\n") == 1
        assert word in caught.err, caught.err
    assert not (tmp_path / "b").exists()
