# SPDX-License-Identifier: Apache-2.0
"""Heads and pages of shared streams that no writer makes: `pull` says so, and the store is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import ConfigError, CorruptRecordError, ReadOnlyError, SpecMismatchError
from kvstore.remote.address import open_server
from kvstore.remote.server import RemoteServer
from kvstore.remote.sharing.messenger import Messenger
from kvstore.remote.sharing.pages import pack_page, page_name
from kvstore.remote.sharing.pull import pull
from kvstore.remote.sharing.push import push
from kvstore.store import Access, Store
from tests.remote_servers import redis_server
from tests.store_blocks import HEADER, LAYOUT, make_blocks, open_store

Head = dict[str, Any]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RemoteServer]:
    """A server that has a stream of four blocks."""
    with (
        redis_server(tmp_path) as redis,
        open_server(redis.address) as server,
        open_store(tmp_path / "origin") as origin,
    ):
        origin.create_stream(HEADER)
        origin.append("lecture", make_blocks(4), {"next": 4})
        origin.flush()
        push(origin, server, "lecture")
        yield server


def change_head(server: RemoteServer, change: Callable[[Head], object]) -> None:
    messenger = Messenger(server, None)
    data = messenger.fetch_head("lecture")
    assert data is not None
    head = json.loads(data)
    change(head)
    messenger.send_head("lecture", json.dumps(head).encode())


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HEADS: dict[str, Callable[[Head], object]] = {
    "half a head": lambda head: head["header"]["spec"].update(kv_heads=3.5),
    "a truth for a number": lambda head: head["header"]["spec"].update(num_layers=True),
    "words for numbers": lambda head: head["header"]["spec"].update(key_dim="8"),
    "more layers than records have": lambda head: head["header"]["spec"].update(num_layers=1 << 20),
    "blocks of gigabytes": lambda head: head["header"]["spec"].update(num_layers=60000, kv_heads=2000),
    "half a token": lambda head: head["header"].update(block_tokens=40.5),
    "a number for a word": lambda head: head["header"].update(prefill=7),
    "a number for an architecture": lambda head: head["header"]["spec"].update(architecture=7),
    "no facts": lambda head: head["header"].update(source=[1]),
    "facts too deep to store": lambda head: head["header"].update(source={"deep": nested(700)}),
    "an endless time": lambda head: head["header"].update(created_unix_s=10**400),
    "fewer than no entries": lambda head: head.update(num_entries=-5, pages=[]),
    "a page too many": lambda head: head.update(pages=head["pages"] * 2),
    "another page": lambda head: head.update(pages=["00" * 32]),
    "no names": lambda head: head.update(pages=[5]),
    "other counts": lambda head: head.update(num_tokens=1),
    "a list for a cursor": lambda head: head.update(cursor=[]),
    "a calibration of no name": lambda head: head.update(calibrations=["xy"]),
    "a calibration that nobody has": lambda head: head.update(calibrations=["11" * 16]),
    "too many calibrations": lambda head: head.update(calibrations=["00" * 16] * 10_000),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("has_layout", [True, False], ids=["with-a-layout", "for-any-model"])
def test_a_head_that_no_writer_makes_is_refused_and_leaves_nothing(
    tmp_path: Path, server: RemoteServer, name: str, has_layout: bool
) -> None:
    change_head(server, HEADS[name])
    layout = LAYOUT if has_layout else None
    with Store.open(tmp_path / "copy", access=Access.WRITE, layout=layout) as store:
        with pytest.raises((CorruptRecordError, SpecMismatchError) if has_layout else CorruptRecordError):
            pull(store, server, "lecture")
        assert store.streams() == []
        assert store.verify().is_clean


@pytest.mark.parametrize("key_of", [0, 1], ids=["of-its-own", "of-another"])
def test_entries_that_do_not_fit_their_blocks_are_refused(tmp_path: Path, server: RemoteServer, key_of: int) -> None:
    first, *others = [block.entry for block in make_blocks(4)]
    entries = [replace(first, key=[first, others[0]][key_of].key, num_tokens=first.num_tokens - 1), *others]
    page = pack_page(entries, [b""] * 4)
    Messenger(server, None).send_page(page_name(page), page)
    change_head(
        server,
        lambda head: head.update(pages=[page_name(page).hex()], num_tokens=sum(entry.num_tokens for entry in entries)),
    )
    with open_store(tmp_path / "copy") as store:
        with pytest.raises(CorruptRecordError):
            pull(store, server, "lecture")
        assert store.streams() == []


def test_a_stream_that_was_refused_can_be_pulled_when_its_head_is_right(tmp_path: Path, server: RemoteServer) -> None:
    change_head(server, lambda head: head["header"].update(prefill="otherwise", block_tokens=41))
    with open_store(tmp_path / "copy") as store:
        with pytest.raises(SpecMismatchError):
            pull(store, server, "lecture")
        change_head(server, lambda head: head.update(header=json.loads(HEADER.to_json())))
        assert pull(store, server, "lecture").num_moved == 4
        assert store.verify().is_clean


def test_a_store_open_for_reading_pulls_nothing(tmp_path: Path, server: RemoteServer) -> None:
    open_store(tmp_path / "copy").close()
    with open_store(tmp_path / "copy", Access.READ) as store, pytest.raises(ReadOnlyError):
        pull(store, server, "lecture")


def test_an_end_without_new_blocks_arrives_and_is_not_taken_back(tmp_path: Path, server: RemoteServer) -> None:
    with open_store(tmp_path / "copy") as store:
        pull(store, server, "lecture")
        change_head(server, lambda head: head.update(cursor={"next": 4, "is_complete": True}))
        assert pull(store, server, "lecture").num_moved == 0
        assert store.manifest("lecture").is_complete
        change_head(server, lambda head: head.update(cursor={"next": 4}))
        pull(store, server, "lecture")
        assert store.manifest("lecture").is_complete


def test_an_empty_stream_travels(tmp_path: Path, server: RemoteServer) -> None:
    with open_store(tmp_path / "empty") as origin:
        origin.create_stream(replace(HEADER, name="empty"))
        push(origin, server, "empty")
    with open_store(tmp_path / "copy") as store:
        assert pull(store, server, "empty").num_entries == 0
        assert [header.name for header in store.streams()] == ["empty"]


def test_another_stream_of_that_name_is_left_alone(tmp_path: Path, server: RemoteServer) -> None:
    with open_store(tmp_path / "copy") as store:
        store.create_stream(replace(HEADER, prefill="otherwise"))
        with pytest.raises(ConfigError, match="made otherwise"):
            pull(store, server, "lecture")
        assert store.manifest("lecture").entries == ()
