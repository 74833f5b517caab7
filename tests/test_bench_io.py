# SPDX-License-Identifier: Apache-2.0
"""What `bench io` compares with: the native loop moves the right bytes, rivals keep theirs, the plot can be read."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from transfers.plot import drawing
    from transfers.raw import RawFile, build
    from transfers.rivals import BlockFiles, LmdbValues, MappedFile, Rival, SafetensorsFiles
    from transfers.rounds import Call, rounds
    from transfers.stores import layout_of

PAGE = 4096
CHANCE = np.random.default_rng(0)


@pytest.mark.parametrize("is_uring", [False, True])
@pytest.mark.parametrize("depth", [1, 3, 32])
def test_the_native_loop_moves_every_piece_to_its_place(tmp_path: Path, depth: int, is_uring: bool) -> None:
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        pytest.skip("there is no C++ compiler")
    data = CHANCE.integers(0, 256, (40, PAGE), dtype=np.uint8)
    path = tmp_path / "data"
    path.write_bytes(data.tobytes())
    raw = RawFile(build(tmp_path), path, 20 * PAGE)
    if is_uring and not raw.has_uring():
        pytest.skip("no io_uring here")
    chosen = CHANCE.permutation(40)[:20]
    places = (chosen * PAGE).astype(np.uint64)

    raw.move(places, PAGE, depth, is_uring=is_uring)
    assert (raw.memory.reshape(20, PAGE) == data[chosen]).all()

    raw.memory[:] = CHANCE.integers(0, 256, raw.memory.size, dtype=np.uint8)
    raw.move(places, PAGE, depth, is_write=True, is_uring=is_uring)
    raw.sync()
    data[chosen] = raw.memory.reshape(20, PAGE)
    assert path.read_bytes() == data.tobytes()
    with pytest.raises(OSError, match="error"):
        raw.move(np.array([40 * PAGE], dtype=np.uint64), PAGE, depth, is_uring=is_uring)
    raw.close()


def test_rivals_bring_what_they_were_given_cold_and_warm(tmp_path: Path) -> None:
    blocks = list(CHANCE.integers(0, 256, (6, 4 * PAGE), dtype=np.uint8))
    rivals: list[Rival] = [
        LmdbValues(tmp_path / "lmdb", 1 << 20),
        BlockFiles(tmp_path / "files"),
        SafetensorsFiles(tmp_path / "safetensors"),
        MappedFile(tmp_path / "mapped", 4 * PAGE, 6),
    ]
    for rival in rivals:
        rival.write(range(6), blocks)
        rival.write([4], [blocks[1]])
        for forget in (True, False):
            if forget:
                rival.forget([4, 0, 5])
            into = [np.zeros(4 * PAGE, dtype=np.uint8) for _ in range(3)]
            rival.read([4, 0, 5], into)
            assert all(
                (left == right).all() for left, right in zip(into, (blocks[1], blocks[0], blocks[5]), strict=True)
            )
        rival.close()


def test_each_call_of_a_round_is_prepared_for_itself() -> None:
    seen: list[str] = []
    calls = {name: Call(partial(seen.append, name), partial(seen.append, f"before {name}")) for name in "ab"}

    timings = rounds(calls, least=4, most_s=0)

    assert seen == ["before a", "a", "before b", "b"] * 5
    assert [timing.iterations for timing in timings.values()] == [4, 4]


def test_layouts_have_the_size_asked_for() -> None:
    for nbytes in (4096, 16 << 10, 64 << 10, 1 << 20, 4 << 20):
        assert layout_of(nbytes).slot_nbytes == nbytes


def test_the_plot_shows_every_curve_by_name() -> None:
    curves = {"roof": [(4096, 0.25), (1 << 20, 2.5)], "a < b": [(4096, 0.02)]}

    found = ElementTree.fromstring(drawing({"cold reads": curves, "writes": curves}, "roof"))

    texts = [element.text for element in found.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("a < b") == texts.count("roof") == 2
    assert len(list(found.iter("{http://www.w3.org/2000/svg}polyline"))) == 4
