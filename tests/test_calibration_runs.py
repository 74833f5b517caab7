# SPDX-License-Identifier: Apache-2.0
"""The runs that a model is calibrated with: cut from texts and from stored streams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kvstore.codec import Profile
from kvstore.engines.anatomy import spec_of
from kvstore.engines.calibrating import (
    FITTED_TOKENS,
    JUDGED_TOKENS,
    NEEDED_TOKENS,
    NUM_FITTED,
    NUM_JUDGED,
    runs_of_stream,
    runs_of_text,
)
from kvstore.engines.past import read_run
from kvstore.errors import ConfigError, SpecMismatchError
from kvstore.layout import BlockLayout
from kvstore.store import Access, Store
from tests.tiny_models import BLOCK_TOKENS, attached_stream, language_model_of, policy, settings, token_ids


def test_runs_are_spread_over_a_text_and_short_texts_are_refused() -> None:
    language_model = language_model_of()
    ids = token_ids(NEEDED_TOKENS + 1000)[0].tolist()
    runs = list(runs_of_text(language_model, ids))
    assert [run.keys.shape[2] for run in runs] == NUM_FITTED * [FITTED_TOKENS] + NUM_JUDGED * [JUDGED_TOKENS]
    assert [run.continuation.shape[1] for run in runs] == NUM_FITTED * [128] + NUM_JUDGED * [512]
    assert runs[0].continuation[0].tolist() == ids[FITTED_TOKENS : FITTED_TOKENS + 128]
    assert runs[NUM_FITTED - 1].continuation[0].tolist() == ids[-128:]
    said = [tuple(run.continuation[0].tolist()) for run in runs]
    starts = [next(at for at in range(len(ids)) if tuple(ids[at : at + len(each)]) == each) for each in said]
    order = sorted(range(len(starts)), key=starts.__getitem__)
    assert order == [0, 4, 1, 2, 5, 3]  # what is judged lies between what is fitted
    with pytest.raises(ConfigError, match="too few"):
        runs_of_text(language_model, ids[: NEEDED_TOKENS - 1])


def _store_stream(path: Path, model: PreTrainedModel, num_tokens: int, profile: Profile = Profile.LOSSLESS) -> None:
    """Store a stream that has read random tokens."""
    with attached_stream(path, model, settings(policy(), window=256, sinks=0), profile=profile) as attached:
        for ids in token_ids(num_tokens).split(512, dim=1):
            model(input_ids=ids, past_key_values=attached.cache())
        attached.session.commit(partial=True)


def test_runs_of_a_stream_hold_what_is_stored_at_their_place(tmp_path: Path) -> None:
    language_model = language_model_of()
    num_tokens = NUM_FITTED * FITTED_TOKENS + NUM_JUDGED * JUDGED_TOKENS + 3
    _store_stream(tmp_path, language_model.model, num_tokens)
    spec = spec_of(language_model.model)
    layout = BlockLayout(spec, BLOCK_TOKENS)
    with Store.open(tmp_path, access=Access.READ, layout=layout, host_nbytes=4 << 20) as store:
        runs = list(runs_of_stream(language_model, store, "s", layout))
    whole = read_run(language_model.model, token_ids(num_tokens), token_ids(1))
    for run in runs:
        window = slice(run.first_token, run.first_token + run.keys.shape[2])
        # The window moves with the stream; what the first layer makes of a token does not depend on it.
        torch.testing.assert_close(run.keys[0], whole.keys[0, :, window], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(run.values[0], whole.values[0, :, window], rtol=1e-3, atol=1e-3)
        assert int(run.continuation[0, 0]) == ord("\n")
    assert [run.continuation.shape[1] for run in runs] == NUM_FITTED * [128] + NUM_JUDGED * [512]
    assert runs[NUM_FITTED - 1].first_token == num_tokens - FITTED_TOKENS


def test_streams_of_another_model_lossy_or_short_ones_are_refused(tmp_path: Path) -> None:
    language_model = language_model_of()
    layout = BlockLayout(spec_of(language_model.model), BLOCK_TOKENS)
    _store_stream(tmp_path / "short", language_model.model, 64)
    _store_stream(tmp_path / "lossy", language_model.model, 64, Profile.Q8)
    for folder, model, error, words in (
        ("short", language_model, ConfigError, "too few"),
        ("short", language_model_of("qwen3"), SpecMismatchError, "another model"),
        ("lossy", language_model, ConfigError, "only exact"),
    ):
        with (
            Store.open(tmp_path / folder, access=Access.READ, layout=layout, host_nbytes=4 << 20) as store,
            pytest.raises(error, match=words),
        ):
            runs_of_stream(model, store, "s", layout)
