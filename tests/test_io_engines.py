# SPDX-License-Identifier: Apache-2.0
"""Which engine moves the bytes, where io_uring is refused, and what a forked child may do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.native import Arena, DirectFile, IoPool, Ticket

HANG_S = 20.0
PAGE = 4096


FORKING = """
import os, sys
from kvstore.errors import ConfigError
from kvstore.native import Arena, DirectFile, IoPool

engine = sys.argv[2]
pool, file, arena = IoPool(2, engine), DirectFile(sys.argv[1], True), Arena(4096, False)
ticket = pool.submit_write(file, arena, [(0, 0, 4096)])
child = os.fork()
if child == 0:
    refused = 0
    calls = [ticket.wait, ticket.wait_some, ticket.done, ticket.errors, ticket.cancel, pool.close]
    for call in (*calls, *(lambda: move(file, arena, [(0, 0, 4096)]) for move in (pool.submit_read, pool.write))):
        try:
            call()
        except ConfigError:
            refused += 1
    del ticket, pool
    IoPool(1, engine).submit_read(file, arena, [(0, 0, 4096)]).wait()
    sys.exit(refused)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
ticket.wait()
pool.close()
sys.exit(code)
"""


def test_a_forked_child_is_refused_instead_of_hanging(tmp_path: Path, engine: str) -> None:
    (tmp_path / "data").write_bytes(bytes(PAGE))

    done = subprocess.run([sys.executable, "-c", FORKING, str(tmp_path / "data"), engine], timeout=30, check=False)

    assert done.returncode == 8


@pytest.mark.parametrize(
    ("num_threads", "engine_name", "depth", "message"),
    [
        (0, None, 64, "num_threads is 0"),
        (257, None, 64, "num_threads is 257"),
        (1, None, 0, "depth is 0"),
        (1, None, 1025, "depth is 1025"),
        (1, "aio", 64, "engine is 'aio'"),
    ],
)
def test_settings_out_of_range_are_refused(num_threads: int, engine_name: str | None, depth: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IoPool(num_threads, engine_name, depth)


def test_the_engine_asked_for_is_the_one_taken(engine: str) -> None:
    assert IoPool(1, engine).engine == engine


# A filter like those of container runtimes: a system call fails with EPERM, always, or unless its second argument is 0.
FILTERED = """
import ctypes, struct, sys
from kvstore.errors import ConfigError, StoreIOError
from kvstore.native import Arena, DirectFile, IoPool

refused = [(0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
if sys.argv[3] == "always":
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, int(sys.argv[2])), *refused]
else:
    steps = [(0x20, 0, 0, 0), (0x15, 0, 3, int(sys.argv[2])), (0x20, 0, 0, 24), (0x15, 1, 0, 0), *refused]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    sys.exit(77)
pool, file, arena = IoPool(2), DirectFile(sys.argv[1], True), Arena(4096, False)
tickets = [pool.submit_write(file, arena, [(4096 * at, 0, 4096)] * 100) for at in range(3)]
try:
    for ticket in tickets:
        ticket.wait(20)
    IoPool(2, "io_uring")
except (ConfigError, StoreIOError) as error:
    print(pool.engine, file.size(), error)
tickets += [pool.submit_read(file, arena, [(0, 0, 4096)])]
pool.close()
print([len(ticket.errors()) for ticket in tickets if ticket.done()])
"""


def run_filtered(folder: Path, number: int, when: str) -> str:
    """What a program prints whose system call `number` is refused."""
    command = [sys.executable, "-c", FILTERED, str(folder / "data"), str(number), when]
    done = subprocess.run(command, timeout=30, check=False, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this system sets no seccomp filter")
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("number", "refused"),
    [(425, "set up an io_uring"), (426, "enter an io_uring"), (427, "ask what an io_uring can do")],
)
def test_threads_move_the_bytes_where_the_kernel_refuses_io_uring(tmp_path: Path, number: int, refused: str) -> None:
    said = run_filtered(tmp_path, number, "always")

    assert said.startswith(f"threads 12288 there is no io_uring here: {refused}: Operation not permitted")
    assert said.endswith("[0, 0, 0, 0]\n")


def test_transfers_end_when_the_kernel_refuses_them_later(tmp_path: Path) -> None:
    said = run_filtered(tmp_path, 426, "with something to submit")

    if not said.startswith("threads"):  # where there was no io_uring before
        assert said.startswith(f"io_uring 0 [Errno 1] write {tmp_path}")
        assert "Operation not permitted" in said
        assert said.endswith("[100, 100, 100, 1]\n")


def num_sleeps() -> int:
    """How often threads of this process have gone to sleep so far."""
    tasks = [task.read_text() for task in Path("/proc/self/task").glob("*/status")]
    return sum(int(line.split()[1]) for task in tasks for line in task.splitlines() if line.startswith("voluntary"))


@pytest.fixture
def ring() -> Iterator[IoPool]:
    """A pool on a ring. Only there can transfers of pipes, which stall for as long as a test wants, be asked for."""
    try:
        pool = IoPool(2, "io_uring")
    except ConfigError as error:
        pytest.skip(str(error))
    yield pool
    pool.close()


@contextmanager
def stalled_reads(pool: IoPool, count: int, nbytes: int) -> Iterator[Ticket]:
    """Reads of a device, that of all pipes, which wait until the end of the `with` block."""
    source, sink = os.pipe()
    try:
        file = DirectFile(f"/proc/self/fd/{source}", False)
        arena = Arena(count * nbytes, pinned=False)
        yield pool.submit_read(file, arena, [(0, at * nbytes, nbytes) for at in range(count)])
    finally:
        os.close(sink)  # what still waits finds the end of the file
        os.close(source)


def test_a_ring_sleeps_while_its_transfers_stall(ring: IoPool) -> None:
    with stalled_reads(ring, 32, PAGE) as ticket:
        time.sleep(0.2)
        before = num_sleeps()
        time.sleep(0.5)

        assert num_sleeps() - before < 200
        assert not ticket.done()


@pytest.mark.parametrize(("count", "nbytes"), [(300, PAGE), (8, 1 << 20)])
def test_a_device_that_stalls_holds_up_no_other(ring: IoPool, tmp_path: Path, count: int, nbytes: int) -> None:
    file = DirectFile(str(tmp_path / "data"), True)
    arena = Arena(8 << 20, pinned=False)
    with stalled_reads(ring, count, nbytes) as stalled:
        assert ring.submit_write(file, arena, [(0, 0, 8 << 20)]).wait(HANG_S)
        assert ring.submit_read(file, arena, [(at * PAGE, at * PAGE, PAGE) for at in range(300)]).wait(HANG_S)
        assert not stalled.done()


@pytest.mark.parametrize(("count", "nbytes"), [(300, PAGE), (8, 1 << 20)])
def test_reads_pass_writes_of_their_device(ring: IoPool, tmp_path: Path, count: int, nbytes: int) -> None:
    (tmp_path / "data").write_bytes(bytes(PAGE))
    os.mkfifo(tmp_path / "fifo")
    source = os.open(tmp_path / "fifo", os.O_RDWR | os.O_NONBLOCK)
    fifo = DirectFile(str(tmp_path / "fifo"), True)
    writes = ring.submit_write(fifo, Arena(nbytes, pinned=False), [(0, 0, nbytes)] * count)
    try:
        file = DirectFile(str(tmp_path / "data"), False)
        assert ring.submit_read(file, Arena(PAGE, pinned=False), [(0, 0, PAGE)]).wait(HANG_S)
        assert not writes.done()
    finally:
        while not writes.done():
            with suppress(BlockingIOError):
                os.read(source, 1 << 20)
        os.close(source)
    writes.wait()
