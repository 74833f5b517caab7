# SPDX-License-Identifier: Apache-2.0
"""The crash matrix of docs/durability.md: a writer ends before each single write and sync, by a kill or a power cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
from _pytest.mark.structures import ParameterSet

import kvstore
import kvstore.store
from kvstore.native import IoPool
from kvstore.store import Access, Durability, FetchRequest, NewObject, Outcome, Store
from kvstore.tiers.disk import Found
from kvstore.tiers.upkeep.export_stream import export_stream
from kvstore.tiers.upkeep.repair import Repairer
from tests.crash_changes import BUDGET_NBYTES, CHANGES, NUM_BLOCKS, OLD, PLAIN, Change
from tests.faulty_disk import build, faults
from tests.store_blocks import (
    HEADER,
    block_key,
    empty_slot,
    make_blocks,
    make_slot,
    open_store,
    same_block,
)

PATIENCE_S = 120
MOST_CALLS = 400


def export_another(path: Path) -> None:
    """A file with a stream that begins like the store's, and goes on."""
    with open_store(path.with_name("origin")) as store:
        store.create_stream(replace(HEADER, name="other"))
        store.append("other", make_blocks(NUM_BLOCKS + 2), {"next": NUM_BLOCKS + 2})
        store.put_objects("other", OLD)
        store.flush()
        export_stream(store._disk, store._pool, "other", path.with_name("exported"))
    shutil.rmtree(path.with_name("origin"))


def damage_a_plain_block(path: Path) -> None:
    with open_store(path, Access.READ) as store:
        (found,) = store._disk.look_up([block_key(PLAIN[0])], [False])
        assert isinstance(found, Found)
        file = store._disk.files.path(found.record.extent.file_id)
    with file.open("r+b") as extents:
        extents.seek(found.record.extent.offset + 1000)
        extents.write(bytes(100))


def make_store(path: Path) -> None:
    with open_store(path, disk_nbytes=BUDGET_NBYTES) as store:
        store.create_stream(HEADER)
        store.put([block_key(number) for number in PLAIN], [make_slot(number) for number in PLAIN], [40] * len(PLAIN))
        store.append("lecture", make_blocks(NUM_BLOCKS), {"next": NUM_BLOCKS})
        store.put_objects("lecture", OLD)


def listed(objects: Sequence[NewObject], num_blocks: int) -> dict[tuple[str, int, int], list[bytes | None]]:
    """Objects of a stream of so many blocks, with their parts."""
    return {
        (each.kind, each.index, each.num_blocks): [bytes(part) for part in each.parts]
        for each in objects
        if each.num_blocks <= num_blocks
    }


def objects_of(store: Store, name: str) -> dict[tuple[str, int, int], list[bytes | None]]:
    """The same, as the store has them."""
    return {
        (kind, each.index, each.num_blocks): store.read_object(name, kind, each.index)
        for kind in ("index", "state")
        for each in store.objects(name, kind)
    }


def check(path: Path, change: Change, is_acknowledged: bool) -> None:
    """A sound store, as it was before or after; after, if that was acknowledged."""
    with open_store(path, Access.WRITE) as store:
        if change.is_repair and not is_acknowledged:
            Repairer(store._disk, store._pool).run()
        report = store.verify()
        assert report.is_clean, report
        assert report.account is not None
        assert report.account.unaccounted_nbytes == 0
        found = {header.name: len(store.manifest(header.name).entries) for header in store.streams()}
        found = {name: count for name, count in found.items() if count > 0}
        assert found == change.after or (found == change.before and not is_acknowledged), found
        for name, count in found.items():
            assert store.manifest(name).cursor == {"next": count}
            entries = store.manifest(name).entries
            requests = [FetchRequest(entry.key, empty_slot()) for entry in entries]
            assert all(outcome.is_hit for outcome in store.fetch(requests).outcomes)
            assert all(same_block(request.slot, make_slot(number)) for number, request in enumerate(requests))
            have = objects_of(store, name)
            early = not is_acknowledged and (have == listed(OLD, count) or (name == "other" and not have))
            assert early or have == listed(change.objects, count), have
        for number in (*PLAIN, *range(200, 216)):
            slot = empty_slot()
            (outcome,) = store.get([block_key(number)], [slot])
            assert outcome is Outcome.MISS or same_block(slot, make_slot(number)), f"block {number} holds other bytes"
            assert outcome.is_hit or number not in change.stored or not is_acknowledged, f"block {number} is lost"


def run_all(scratch: Path, name: str, durability: Durability, has_power: bool) -> int:
    """End a writer before its first call, before its second, and so on until it is through; returns how many."""
    change = CHANGES[name]
    template = scratch / f"{name}-{durability}-{has_power}"
    make_store(template)
    export_another(template)
    if change.is_repair:
        damage_a_plain_block(template)
    for number in range(1, MOST_CALLS):
        path, said = template.with_name("store"), template.with_name("said")
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(template, path)
        said.unlink(missing_ok=True)

        def work(path: Path = path, said: Path = said, number: int = number) -> None:
            store = open_store(path, disk_nbytes=BUDGET_NBYTES, durability=durability)
            loses = 0 if has_power else number  # 1 loses all, others some
            with faults(extents=True, catalogue=True, end_at=number, loses=loses):
                change.run(store)
                said.touch()
            with faults(extents=True, end_at=1, loses=min(loses, 1)), (path / "last.extents").open("wb", 0) as last:
                last.write(b"one more call")

        status = in_child(work)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it failed by itself"
        is_acknowledged = said.exists()
        checked = in_child(lambda path=path, change=change, said=is_acknowledged: check(path, change, said))  # type: ignore[misc]
        assert checked == 0, f"ended before call {number}, acknowledged: {is_acknowledged}; its traceback is above"
        if is_acknowledged:
            return number
    raise AssertionError(f"{name} takes more than {MOST_CALLS} calls")


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked child; returns its wait status."""
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE_S)
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """A process on the faulty disk, which runs what it is asked to and answers how that went."""
    # In memory, where it can be: what a sync means is up to the library, and the device's part of it only takes time.
    memory = Path("/dev/shm")
    scratch = Path(mkdtemp(dir=memory)) if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("matrix")
    roots = [str(Path(kvstore.__file__).parents[1]), str(Path(__file__).parents[1])]
    with subprocess.Popen(
        [sys.executable, __file__, str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **build(scratch), "PYTHONPATH": os.pathsep.join(roots)},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run(words: str) -> str:
            stdin.write(words + "\n")
            stdin.flush()
            return stdout.readline().strip()

        yield run
        stdin.close()
    shutil.rmtree(scratch)


def _cases(quick: tuple[str, ...], levels: tuple[Durability, ...]) -> list[ParameterSet]:
    """All changes at all levels; the quick ones at `commit` alone are not slow."""
    return [
        pytest.param(name, level, marks=() if name in quick and level is Durability.COMMIT else pytest.mark.slow)
        for level in levels
        for name in CHANGES
    ]


@pytest.mark.parametrize(("name", "durability"), _cases(("append", "compact"), tuple(Durability)))
def test_killed_before_any_call(name: str, durability: str, ask: Callable[[str], str]) -> None:
    check_answer(ask, f"{name} {durability} power")


@pytest.mark.parametrize(("name", "durability"), _cases(tuple(CHANGES), (Durability.COMMIT, Durability.SYNC)))
def test_without_power_before_any_call(name: str, durability: str, ask: Callable[[str], str]) -> None:
    check_answer(ask, f"{name} {durability} none")


def check_answer(ask: Callable[[str], str], words: str) -> None:
    answer = ask(words)
    assert answer.startswith("survived "), answer
    sys.stdout.write(f"{words}: {answer} ends\n")


def serve(scratch: Path) -> None:
    """Answer each line of words with one line."""
    # The library sees the calls of threads, not what is handed to the kernel in a ring.
    setattr(kvstore.store, "IoPool", partial(IoPool, engine="threads"))  # noqa: B010 - a type to mypy
    for line in sys.stdin:
        name, durability, power = line.split()
        try:
            answer = f"survived {run_all(scratch, name, Durability(durability), power == 'power')}"
        except AssertionError as error:
            answer = f"failed: {error}"
        os.write(1, (" ".join(answer.split()) + "\n").encode())


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
