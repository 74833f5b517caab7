# SPDX-License-Identifier: Apache-2.0
"""The benchmark of long streams, on short ones: planted runs are found, and every row can be checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_long
    from harness import check_rows
    from long_streams import phases
    from long_streams.made import CHUNK_TOKENS, RUN_TOKENS, SPACING_TOKENS, MadeStream
    from long_streams.memory import resident_nbytes

SHORT, LONG = 4 * SPACING_TOKENS, 8 * SPACING_TOKENS


def test_a_made_stream_is_the_same_however_often_it_is_made() -> None:
    left, right = MadeStream(), MadeStream()
    needle = left.needle(1)
    first = needle.first_token // CHUNK_TOKENS * CHUNK_TOKENS
    chunk, row = left.chunk(first), needle.first_token - first
    assert torch.equal(chunk.keys, right.chunk(first).keys)
    assert torch.equal(chunk.ids[row : row + RUN_TOKENS], needle.words)
    assert chunk.positions[0, 0].tolist() == list(range(first, first + CHUNK_TOKENS))
    asked = left.question(1)
    assert torch.equal(asked.ids[RUN_TOKENS:], needle.words)
    mean = torch.cat([left.chunk(0).keys, left.chunk(CHUNK_TOKENS).keys], dim=3).float().mean(dim=3, keepdim=True)
    planted, echo = (each.keys.float() - mean for each in (chunk, asked))
    echoes = torch.cosine_similarity(
        planted[..., row + 1 : row + RUN_TOKENS, :], echo[..., RUN_TOKENS + 1 :, :], dim=-1
    )
    others = torch.cosine_similarity(planted[..., :RUN_TOKENS, :], echo[..., RUN_TOKENS:, :], dim=-1)
    assert echoes.mean() > 0.7 > 0.3 > others.abs().mean()


def test_what_was_planted_is_found_and_every_row_has_its_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(kind: str, folder: Path, *rest: Any) -> dict[str, Any]:
        found = phases.append(folder, *rest) if kind == "append" else phases.ask(folder, *rest)
        read: dict[str, Any] = json.loads(json.dumps(found))
        return read

    path = tmp_path / "rows.json"
    monkeypatch.setattr(bench_long, "phase", in_this_process)
    options = ["--threads", "1", "--quick", "--folder", str(tmp_path), "--json", str(path)]
    policies = ["--policies", "auto", "streaming_llm"]
    monkeypatch.setattr("sys.argv", ["bench", *options, "--tokens", str(LONG), str(SHORT - 3), *policies])
    bench_long.main()

    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    check_rows(rows)
    recall = {row["case"]["what"]: row["value"] for row in rows if row["metric"] == "recall"}
    assert recall == {f"{SHORT} tokens": 1, f"{LONG} tokens": 1}
    assert {row["baseline"] for row in rows} == {f"{SHORT} tokens"}
    asked = {(row["case"]["what"], row["case"].get("policy")) for row in rows}
    assert len(asked) == 6
    assert [each.name for each in tmp_path.iterdir()] == ["rows.json"]


def test_memory_is_that_of_this_process() -> None:
    before = resident_nbytes()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = resident_nbytes()
    assert after["anonymous"] - before["anonymous"] > 60 << 20
    assert after["peak"] >= held.nbytes
