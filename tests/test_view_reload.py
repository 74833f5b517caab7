# SPDX-License-Identifier: Apache-2.0
"""A stream that another process rolled back and wrote on: what was known of its blocks is known no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvstore.engines.transformers import attach
from kvstore.session.session import Session
from tests.tiny_models import make_model, open_session, policy, settings, token_ids


@pytest.mark.parametrize("name", ["maxsim", "quest", "rekv"])
def test_what_was_searched_before_a_rollback_is_searched_anew(name: str, tmp_path: Path) -> None:
    model = make_model()
    config = settings(policy(name, full_layers=0, recent_tokens=0), window=16, sinks=4, budget=16)
    ids, question = token_ids(96), token_ids(6, seed=5)
    with torch.no_grad(), open_session(tmp_path, model, config) as session:
        view = session.view
        with attach(model, session) as attached:
            model(ids)
            session.commit()
            model(question, past_key_values=attached.question())
        view.store.rollback("s", 24)
        other = Session(view.store, view.header, config, view.rotate, torch.device("cpu"))
        with attach(model, other) as attached:
            model(token_ids(80, seed=9))
            other.commit()
            other.flush()
            wanted = model(question, past_key_values=attached.question()).logits
        view.reload()
        with attach(model, session) as attached:
            had = model(question, past_key_values=attached.question()).logits
    assert torch.equal(had, wanted)
