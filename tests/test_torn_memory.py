# SPDX-License-Identifier: Apache-2.0
"""A memory whose making was interrupted: it is made anew, and no token is in it twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstore.engines.transformers import Attached
from kvstore.retrieval.memory import LayerMemory
from kvstore.session.stream_memory import StreamMemory
from tests.tiny_models import attached_stream, make_model, policy, settings, token_ids


@pytest.mark.parametrize("method", ["add", "show_pending", "_index"])
@pytest.mark.parametrize("calls_before", [0, 1, 2, 4])
def test_an_interrupted_question_can_be_asked_again(
    method: str, calls_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = make_model(), getattr(LayerMemory, method)
    left = [calls_before]
    rule = policy("quest", full_layers=0, recent_tokens=0)

    def interrupted(self: LayerMemory, *args: Any, **kwargs: Any) -> None:
        whole(self, *args, **kwargs)
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt

    def ask(attached: Attached, times: int = 1) -> None:
        for _ in range(times):
            model(token_ids(5, seed=3), past_key_values=attached.question())

    with attached_stream(tmp_path, model, settings(rule, window=24, sinks=4)) as attached:
        for part in token_ids(20 * 8 + 3).split(40, dim=1):
            model(part)
        attached.session.commit(partial=True)
        with monkeypatch.context() as patch:
            patch.setattr(LayerMemory, method, interrupted)
            with pytest.raises(KeyboardInterrupt):
                ask(attached, times=3)
        ask(attached)
        assert attached.last.num_attended_tokens == 163
        search = attached.session.view.search(rule)
        assert isinstance(search, StreamMemory)
        for memory in search._layers:
            assert memory.table._tokens.used.tolist() == [list(range(8, 163))]
