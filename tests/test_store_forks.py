# SPDX-License-Identifier: Apache-2.0
"""Forks and rollbacks: streams share blocks, each goes on by itself, and what nobody needs is gone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvstore
from kvstore.errors import ConfigError, ReadOnlyError, StreamNotFoundError
from kvstore.store import Access, Entry, Outcome, Store
from tests.store_blocks import (
    EXTENT_NBYTES,
    HEADER,
    block_key,
    make_blocks,
    make_slot,
    open_store,
    renumbered,
    requests_for,
    same_block,
)
from tests.test_face import CPU, forward, open_folder, still

ROOT = Path(__file__).parents[1]


def _stream(store: Store, count: int) -> None:
    store.create_stream(HEADER)
    store.append("lecture", make_blocks(count), {"next": count})


def _numbers(store: Store, name: str) -> list[int]:
    """Which blocks a stream consists of; every one is read and compared."""
    known = {block_key(number): number for number in range(40)}
    entries = store.manifest(name).entries
    found = [known[entry.key] for entry in entries]
    requests = requests_for(make_blocks(1, number)[0] for number in found)
    assert all(outcome.is_hit for outcome in store.fetch(requests).outcomes)
    assert all(same_block(request.slot, make_slot(n)) for request, n in zip(requests, found, strict=True))
    assert [entry.index for entry in entries] == list(range(len(entries)))
    summaries = store.summaries(name, 0, len(entries))
    assert [summaries[index] for index in range(len(entries))] == [f"summary {number}".encode() for number in found]
    return found


@pytest.mark.parametrize("at", [None, 0, 40, 160])
def test_a_fork_shares_blocks_and_goes_on_by_itself(tmp_path: Path, at: int | None) -> None:
    with open_store(tmp_path) as store:
        _stream(store, 4)
        shared = 4 if at is None else at // 40
        forked = store.fork("lecture", "other", at)
        assert (forked.num_tokens, forked.cursor) == (40 * shared, {"next": 4} if at is None else {})
        used = store.stats().usage.extent_used_nbytes
        assert used == 4 * EXTENT_NBYTES
        store.append("other", [renumbered(make_blocks(1, 20)[0], shared)], {"next": 21})
        store.append("lecture", make_blocks(1, 4), {"next": 5})
        store.flush()
        assert _numbers(store, "other") == [*range(shared), 20]
        assert _numbers(store, "lecture") == [0, 1, 2, 3, 4]
        assert store.remove_stream("lecture") == (5 - shared) * EXTENT_NBYTES
        assert _numbers(store, "other") == [*range(shared), 20]
        assert store.remove_stream("other") == (shared + 1) * EXTENT_NBYTES
        assert store.stats().num_blocks == 0
        assert store.verify().is_clean


def test_a_rollback_frees_what_nobody_else_needs(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _stream(store, 6)
        store.fork("lecture", "other", 160)
        assert store.rollback("lecture", 80, {"next": 2}) == 2 * EXTENT_NBYTES
        assert (_numbers(store, "lecture"), _numbers(store, "other")) == ([0, 1], [0, 1, 2, 3])
        assert store.manifest("lecture").cursor == {"next": 2}
        assert store.exists([block_key(number) for number in (3, 4, 5)]) == [True, False, False]
        store.append("lecture", [renumbered(make_blocks(1, 30)[0], 2)], {"next": 31})
        store.flush()
        assert _numbers(store, "lecture") == [0, 1, 30]
        assert store.rollback("other", 0) == 2 * EXTENT_NBYTES
        assert _numbers(store, "other") == []
        assert store.verify().is_clean
    with open_store(tmp_path, Access.READ) as store:
        assert _numbers(store, "lecture") == [0, 1, 30]


def test_what_is_still_queued_is_part_of_what_is_forked_or_rolled_back(tmp_path: Path) -> None:
    with open_store(tmp_path, host_slots=12) as store:
        _stream(store, 8)
        assert store.fork("lecture", "other").num_tokens == 320
        store.append("lecture", make_blocks(2, 8), {"next": 10})
        assert store.rollback("lecture", 360) == EXTENT_NBYTES
        assert _numbers(store, "lecture") == list(range(9))


@pytest.mark.parametrize("at", [1, 39, 41, 159, 161, -1, 1 << 70])
def test_only_the_end_of_a_block_can_be_forked_or_rolled_back_to(tmp_path: Path, at: int) -> None:
    with open_store(tmp_path) as store:
        _stream(store, 4)
        for call in (lambda: store.fork("lecture", "other", at), lambda: store.rollback("lecture", at)):
            with pytest.raises(ConfigError, match=r"use \d+ or \d+|is not among them"):
                call()
        assert [header.name for header in store.streams()] == ["lecture"]
        assert _numbers(store, "lecture") == [0, 1, 2, 3]


def test_misuse_is_named(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _stream(store, 1)
        with pytest.raises(ConfigError, match="there is a stream 'lecture'"):
            store.fork("lecture", "lecture")
        for call in (lambda: store.fork("nothing", "other"), lambda: store.rollback("nothing", 0)):
            with pytest.raises(StreamNotFoundError):
                call()
    with open_store(tmp_path, Access.READ) as store, pytest.raises(ReadOnlyError):
        store.fork("lecture", "other")


def test_a_reader_sees_a_rolled_back_block_as_a_miss(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _stream(store, 3)
        store.rollback("lecture", 80)
        (request,) = requests_for(make_blocks(1, 2))
        assert store.fetch([request]).outcomes == [Outcome.MISS], "it is not in memory either"


def fork_until_killed(path: Path, seed: int) -> None:
    """Fork, append, roll back and remove at random."""
    rng = random.Random(seed)
    with open_store(path) as store:
        if not store.streams():
            _stream(store, 6)
            store.flush()
        sys.stdout.write("open\n")
        sys.stdout.flush()
        for turn in range(100_000):
            store.flush()
            names = [header.name for header in store.streams()]
            name = rng.choice(names)
            count = len(store.manifest(name).entries)
            match rng.randrange(4):
                case 0 if len(names) < 6:
                    store.fork(name, f"fork {seed} {turn}", 40 * rng.randint(0, count))
                case 1:
                    store.append(name, [renumbered(make_blocks(1, rng.randrange(40))[0], count)], {})
                case 2:
                    store.rollback(name, 40 * rng.randint(count // 2, count))
                case _ if len(names) > 3:
                    store.remove_stream(name)


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_killed_fork_leaves_a_whole_store(tmp_path: Path, kills: int) -> None:
    rng = random.Random(kills)
    for seed in range(kills):
        code = "from pathlib import Path; from tests.test_store_forks import fork_until_killed as f; "
        code += f"f(Path({str(tmp_path)!r}), {seed})"
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"open\n"
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.05 + 0.4 * rng.random())
            os.kill(child.pid, signal.SIGKILL)
        with open_store(tmp_path) as store:
            report = store.verify()
            assert report.is_clean, report
            for header in store.streams():
                _numbers(store, header.name)


def _entries(store: kvstore.KVStore, name: str) -> list[Entry]:
    return list(store.blocks.manifest(name).entries)


def test_a_forked_stream_goes_on_as_if_it_had_been_written_alone(tmp_path: Path) -> None:
    with open_folder(tmp_path) as store:
        stream = store.stream("s")
        stream.bind(still, CPU)
        forward(stream, 0, 16)
        forward(stream, 16, 8)
        fork = stream.fork("f", at=16)
        with pytest.raises(ConfigError, match="inside a block"):
            stream.fork("g", at=17)
        # The fork has another continuation, then is rolled back and gets the same one.
        fork.bind(still, CPU)
        other = forward(fork, 16, 4)
        fork.commit()
        fork.rollback(16)
        fork.bind(still, CPU)
        again = forward(fork, 16, 8)
        fork.commit()
        assert [replace(e) for e in _entries(store, "f")] == _entries(store, "s")
        assert store.blocks.stats().num_blocks == 3
        stream.bind(still, CPU)
        left, right = forward(stream, 24, 8), forward(fork, 24, 8)
        assert torch.equal(left, right)
        assert not torch.equal(other, again[:, :, :4]), "another forward"
