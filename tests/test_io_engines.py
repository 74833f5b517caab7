# SPDX-License-Identifier: Apache-2.0
"""Which engine moves the bytes, where io_uring is refused, and what a forked child may do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.native import IoPool

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


# A filter like those of container runtimes: io_uring_setup, number 425 everywhere, fails with EPERM.
WITHOUT_IO_URING = """
import ctypes, struct, sys
from kvstore.errors import ConfigError
from kvstore.native import Arena, DirectFile, IoPool

steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    sys.exit(77)
pool, file, arena = IoPool(2), DirectFile(sys.argv[1], True), Arena(4096, False)
pool.submit_write(file, arena, [(0, 0, 4096)]).wait()
try:
    IoPool(2, "io_uring")
except ConfigError as error:
    print(pool.engine, file.size(), error)
"""


def test_threads_move_the_bytes_where_the_kernel_refuses_io_uring(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_IO_URING, str(tmp_path / "data")]

    done = subprocess.run(command, timeout=30, check=False, capture_output=True, text=True)

    if done.returncode == 77:
        pytest.skip("this system sets no seccomp filter")
    assert done.stdout.startswith("threads 4096 there is no io_uring here: set up an io_uring: Operation not permitted")
