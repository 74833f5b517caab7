# SPDX-License-Identifier: Apache-2.0
"""The latency benchmark of large shapes: what it times is what it says, on small contexts and on any device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvstore.errors import ConfigError
from kvstore.kernels.scoring_reference import best_of
from kvstore.retrieval.registry import policy_named

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_shapes
    from harness import check_rows
    from shapes.layer import Layer
    from shapes.models import SHAPES, Shape
    from shapes.scorers import PageScorer

TINY = Shape(2, 4, 2, 64, 10_000.0)
TINY_GRIDS = Shape(2, 4, 2, 64, 10_000.0, (8, 12, 12))


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the threads of this process as they are."""
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_row_has_its_baseline_and_limits_are_bytes_over_bandwidth(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"tiny": TINY, "tiny-grids": TINY_GRIDS}
    monkeypatch.setattr(bench_shapes, "SHAPES", shapes)
    monkeypatch.setattr("shapes.clock._CPU_NBYTES", 1 << 20)
    monkeypatch.setattr("shapes.clock._CUDA_NBYTES", 1 << 20)
    monkeypatch.setattr(bench_shapes, "BEYOND_CACHES", {"cpu": 1 << 16, "cuda": 1 << 16})
    monkeypatch.setattr(bench_shapes, "MOST_SELECTIONS", 2)
    monkeypatch.setattr("harness.MIN_ITERATIONS", 2)
    monkeypatch.setattr("shapes.clock.MIN_ITERATIONS", 2)
    arguments = f"shapes --quick --threads 1 --device {device} --tokens 1024 2048 --budget-tokens 128".split()
    arguments += ["--models", *shapes, "--policies", "quest", "auto", "shadowkv", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr("sys.argv", arguments)
    bench_shapes.main()

    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    check_rows(rows)
    assert {row["case"]["tokens"] for row in rows} == {1024, 2048}
    assert {row["case"]["model"] for row in rows} == set(shapes)
    limits = [row for row in rows if row["case"]["what"] == "reading its bytes" and row["case"]["model"] == "tiny"]
    nbytes = {(row["metric"], row["case"].get("policy"), row["case"]["tokens"]): row["value"] for row in limits}
    token = 2 * 64 * 2 * 2  # key and value, two heads, 2 bytes
    one = nbytes["attend to all", None, 1024] / (1024 * token)
    for place, wanted in {
        ("attend to all", None, 2048): 2048 * token,
        ("attend to the chosen", "quest", 2048): 128 * token,
        ("choose", "quest", 2048): 128 * 2 * 128 * 2,  # pages, heads, elements
        ("choose", "auto", 2048): 256 * 2 * (128 + 64) * 2,
        ("summarise a block", None, 1024): 128 * token // 2,
    }.items():
        assert nbytes[place] == pytest.approx(one * wanted, rel=1e-3), place
    assert "a copy moves" in capsys.readouterr().out


def test_a_length_that_does_not_fit_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shapes.clock._CPU_NBYTES", 1 << 20)
    monkeypatch.setattr(bench_shapes, "free_nbytes", lambda device: 4 << 30)
    monkeypatch.setattr(
        "sys.argv", ["shapes", "--quick", "--device", "cpu", "--models", "llama-3-8b", "--tokens", "1048576"]
    )
    bench_shapes.main()
    assert "llama-3-8b with 1048576 tokens is left out: it takes 12.0 GiB" in capsys.readouterr().out


def test_shapes_are_those_of_the_models() -> None:
    llama, qwen = SHAPES["llama-3-8b"], SHAPES["qwen2.5-vl-7b"]
    assert (llama.num_layers, llama.num_heads, llama.kv_heads, llama.dim) == (32, 32, 8, 128)
    assert (qwen.num_layers, qwen.num_heads, qwen.kv_heads, qwen.dim) == (28, 28, 4, 128)
    assert sum(qwen.sections) == 64
    assert TINY.angles(3)[:, 0].tolist() == [0, 1, 2]
    # Token 20 of a frame of 14 x 14 tokens: row 1, column 6, of frame 0; token 196 begins frame 1.
    angles, steps = TINY_GRIDS.angles(200), 10_000.0 ** -(torch.arange(32) / 32)
    where = torch.tensor([0] * 8 + [1] * 12 + [6] * 12)
    torch.testing.assert_close(angles[20], where * steps)
    torch.testing.assert_close(angles[196], steps)


@pytest.mark.parametrize("name", ["quest", "arkvale", "shadowkv", "infllm", "ape"])
def test_pages_are_chosen_as_the_policy_does(name: str) -> None:
    """Against `View.lifted`, products and `View.agree` of the same summaries."""
    policy = policy_named(name)
    scorer, chance = PageScorer.of(policy, TINY), torch.Generator().manual_seed(3)
    summaries = scorer.summaries(64 * scorer.page_tokens, torch.device("cpu"), chance)
    query = torch.randn(2, 2, 64, generator=chance)
    scores = []
    for view, rows in zip(policy.views, summaries, strict=True):
        lifted = view.scorer.lift(query)[:, :, None]
        lifted = lifted.sum(dim=1) if str(view.group) == "sum" else lifted.flatten(1, 2)
        scores.append(view.agree(lifted.bfloat16().float() @ rows.float().transpose(1, 2), 1, 64**-0.5))
    wanted = best_of(policy.fusion.fuse(scores), 8)[1]
    assert torch.equal(scorer.choose(query, summaries, 8 * scorer.page_tokens), wanted)


def test_a_policy_without_pages_of_one_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="rekv has no pages of one size"):
        PageScorer.of(policy_named("rekv"), TINY)


def test_a_wrong_attention_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = torch.Generator().manual_seed(4)
    angles = TINY.angles(1024)
    layer = Layer.made(TINY, 1024, (angles.cos().bfloat16(), angles.sin().bfloat16()), torch.device("cpu"), chance)
    query = torch.randn(1, 4, 1, 64, generator=chance).bfloat16()
    keys, values = layer.in_order()
    bench_shapes.check_layer(layer, query, keys, values)
    with pytest.raises(SystemExit, match="differs from sdpa"):
        bench_shapes.check_layer(layer, query, keys.roll(1, dims=2), values)
