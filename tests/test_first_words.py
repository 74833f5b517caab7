# SPDX-License-Identifier: Apache-2.0
"""An ingest's own calibration: what happens when it fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from kvstore.engines.anatomy import spec_of
from kvstore.engines.calibrating import NEEDED_TOKENS
from kvstore.engines.first_words import FirstWords
from kvstore.layout import BlockLayout
from kvstore.record import Profile
from kvstore.store import Access, Store
from tests.tiny_models import language_model_of, token_ids


def _out_of_memory(*args: object, **kwargs: object) -> None:
    raise torch.OutOfMemoryError("tried to allocate 2 GiB")


def test_a_calibration_that_fails_is_told_once_and_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    language_model = language_model_of()
    layout = BlockLayout(spec_of(language_model.model), 128)
    ids = token_ids(NEEDED_TOKENS)[0].tolist()
    monkeypatch.setattr(torch.autograd, "grad", _out_of_memory)
    with Store.open(tmp_path, access=Access.WRITE, layout=layout, profile=Profile.Q3, host_nbytes=4 << 20) as store:
        words = FirstWords(store, language_model, layout, Profile.Q3, lambda share: None)
        words.read(ids)
        assert ["tried to allocate 2 GiB" in message for message in caplog.messages] == [True]
        words.read(ids)
        assert len(caplog.messages) == 1
        assert store.calibrations.of_model(layout.spec) is None
        monkeypatch.undo()
        FirstWords(store, language_model, layout, Profile.Q3, lambda share: None).read(ids)
        assert store.calibrations.of_model(layout.spec) is not None


def test_ctrl_c_still_stops_a_calibration(tmp_path: Path) -> None:
    language_model = language_model_of()
    layout = BlockLayout(spec_of(language_model.model), 128)

    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    with Store.open(tmp_path, access=Access.WRITE, layout=layout, profile=Profile.Q3, host_nbytes=4 << 20) as store:
        words = FirstWords(store, language_model, layout, Profile.Q3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            words.read(token_ids(NEEDED_TOKENS)[0].tolist())


@pytest.mark.parametrize(("key_dim", "is_told"), [(512, False), (514, True)])
def test_more_channels_than_a_basis_holds_are_told_before_anything_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key_dim: int, is_told: bool
) -> None:
    language_model = language_model_of()
    layout = BlockLayout(replace(spec_of(language_model.model), key_dim=key_dim), 128)
    with Store.open(tmp_path, access=Access.WRITE, layout=layout, profile=Profile.PCA, host_nbytes=4 << 20) as store:
        FirstWords(store, language_model, layout, Profile.PCA, lambda share: None)
    assert ["those of q2" in message for message in caplog.messages] == [True] * is_told
