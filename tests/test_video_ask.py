# SPDX-License-Identifier: Apache-2.0
"""Asking a stream from Python: what an answer says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

for _module in ("av", "transformers"):
    pytest.importorskip(_module)

import kvstore  # noqa: E402
from kvstore.engines.anatomy import spec_of  # noqa: E402
from kvstore.engines.loading import load_model  # noqa: E402
from kvstore.session import choosing  # noqa: E402
from kvstore.session.residency import LoadReport, Residency  # noqa: E402
from kvstore.spec import BlockKey  # noqa: E402
from kvstore.video.ask import Asker  # noqa: E402
from tests.cli_runs import save_tiny_model  # noqa: E402


def test_stages_end_with_the_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that chooses at every step goes on loading; that is no part of the time to the first token."""
    loaded_model = load_model(save_tiny_model(tmp_path / "model"), tmp_path)
    model: torch.nn.Module = loaded_model.model
    text = loaded_model.encode("Something was said about nothing in particular. " * 20)
    with (
        kvstore.open(tmp_path / "store", spec_of(model), block_tokens=8, host_nbytes=1 << 20) as store,
        kvstore.attach(loaded_model.model, store.stream("s")),
        torch.no_grad(),
    ):
        model(torch.tensor([text]))
    loads: list[range] = []
    load = Residency.load

    def slow(self: Residency, keys: Sequence[BlockKey], layers: range, timeout_s: float | None = None) -> LoadReport:
        loads.append(layers)
        report = load(self, keys, layers, timeout_s)
        report.load_s += 1.0
        return report

    monkeypatch.setattr(Residency, "load", slow)
    with Asker(tmp_path / "store", "s", loaded_model, policy="infllm", budget_tokens=16) as asker:
        one = asker.ask("What was said?", max_new_tokens=1)
        num_first = len(loads)
        monkeypatch.setattr(choosing, "_are_equal", lambda *_: False)  # each token reads again what it chose again
        whole = asker.ask("What was said?", max_new_tokens=6)
    assert len(loads) > 2 * num_first, "later tokens load too"
    assert one.stages_s.load == pytest.approx(num_first, abs=0.5)
    assert whole.stages_s.load == pytest.approx(num_first, abs=0.5)
    for answer in (one, whole):
        stages = answer.stages_s
        assert answer.ttft_s == pytest.approx(stages.retrieve + stages.load + stages.decode + stages.attend)
