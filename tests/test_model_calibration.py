# SPDX-License-Identifier: Apache-2.0
"""Calibrating a model at hand: sensitivity, and the gate, with tiny random models."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from kvstore.codec import Codec, Profile
from kvstore.decision import KL_LIMITS
from kvstore.engines import calibrating
from kvstore.engines.anatomy import spec_of
from kvstore.engines.calibrating import (
    NEEDED_TOKENS,
    NUM_FITTED,
    calibrate_model,
    runs_of_text,
)
from kvstore.engines.judging import Judge
from kvstore.engines.past import (
    continue_run,
    frozen,
    read_run,
    recomputed,
    sample_continuation,
    states_behind,
    widened,
)
from kvstore.engines.sensitivity import log_steps
from kvstore.errors import CalibrationError
from kvstore.layout import BlockLayout
from kvstore.record import STEPS
from tests.tiny_models import (
    language_model_of,
    make_model,
    token_ids,
)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_run_continues_as_if_the_model_had_read_it_all_at_once(family: str) -> None:
    model, ids = make_model(family), token_ids(48)
    run = read_run(model, ids[:, :40], ids[:, 40:])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[0, 40:].log_softmax(-1)
        found = continue_run(model, run.keys, run.values, run.continuation)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_sampled_continuation_begins_as_told_and_is_the_same_every_time() -> None:
    model, ids = make_model(), token_ids(16)
    run = read_run(model, ids, ids[:, :1])
    drawn = [
        sample_continuation(model, run.keys, run.values, 7, 12, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0].shape == (1, 12)
    assert int(drawn[0][0, 0]) == 7
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_widened_model_computes_in_float32_and_is_left_as_it_was() -> None:
    narrow = make_model(dtype=torch.bfloat16)
    wide = make_model(dtype=torch.bfloat16).float()
    ids = token_ids(32)
    with torch.no_grad(), widened(narrow):
        torch.testing.assert_close(narrow(input_ids=ids).logits, wide(input_ids=ids).logits)
        with pytest.raises(TypeError):
            narrow.model.layers[0].mlp.up_proj("no tensor")
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert narrow.lm_head.weight is narrow.get_output_embeddings().weight


def test_gradients_of_what_is_computed_again_are_the_same() -> None:
    model = make_model()
    run = read_run(model, token_ids(24), token_ids(6, 3))
    found = []
    for context in (nullcontext(), recomputed(model)):
        keys = run.keys.clone().requires_grad_(True)
        with context:
            states = states_behind(model, keys, run.values, run.continuation)
            found.append(torch.autograd.grad(states.square().sum(), keys)[0])
    assert torch.equal(*found)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_keeps_the_forward_that_it_has_of_its_own() -> None:
    model = make_model()
    layer = model.model.layers[1]
    own = partial(layer.forward)
    layer.forward = own
    with recomputed(model):
        assert layer.forward is not own
    assert layer.forward is own
    assert "forward" not in vars(model.model.layers[0])


def test_weights_are_put_back_after_ctrl_c_in_the_middle_of_a_module() -> None:
    model = make_model(dtype=torch.bfloat16)
    projection = model.model.layers[1].self_attn.k_proj
    before = projection.weight

    def interrupt(*args: object) -> None:
        assert projection.weight.dtype == torch.float32
        raise KeyboardInterrupt

    projection.forward = interrupt
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), widened(model):
        model(input_ids=token_ids(4))
    assert projection.weight is before


def test_weights_that_were_loaded_in_inference_mode_are_refused_and_stay_as_they_were() -> None:
    with torch.inference_mode():
        model = make_model()
    with pytest.raises(CalibrationError, match="inference_mode"), frozen(model):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())


def _deaf(model: torch.nn.Module, layer: int, channels: slice) -> None:
    """Make a layer's queries ignore channels of the first KV head (its first two query heads)."""
    weight: Tensor = model.model.layers[layer].self_attn.q_proj.weight  # type: ignore[union-attr, index]
    with torch.no_grad():
        for head in (0, 1):
            weight[16 * head + channels.start : 16 * head + channels.stop] = 0.0


def test_channels_that_no_query_looks_at_get_the_largest_steps_and_the_model_is_left_as_it_was() -> None:
    model = make_model()
    _deaf(model, 1, slice(4, 6))
    _deaf(model, 1, slice(12, 14))  # RoPE turns pairs (4, 12) and (5, 13) into each other
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    runs = [read_run(model, token_ids(64, seed), token_ids(16, seed + 9)) for seed in (1, 2)]
    keys, values = log_steps(model, runs, torch.Generator().manual_seed(0))
    assert keys.shape == (3, 2, 16)
    assert values.shape == (3, 2, 16)
    deaf = keys[1, 0, [4, 5, 12, 13]]
    others = torch.cat([keys[1, 0, :4], keys[1, 0, 6:12], keys[1, 0, 14:]])
    assert int(deaf.min()) > int(others.max()) + 8
    assert torch.equal(values, values[..., :1].expand_as(values))
    assert int(values.abs().max()) <= 16
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sensitivity_is_measured_inside_inference_mode_too() -> None:
    model = make_model()
    with torch.inference_mode():
        runs = [read_run(model, token_ids(32), token_ids(8))]
        inside = log_steps(model, runs, torch.Generator().manual_seed(0))
    outside = log_steps(model, [read_run(model, token_ids(32), token_ids(8))], torch.Generator().manual_seed(0))
    assert all(torch.equal(*pair) for pair in zip(inside, outside, strict=True))


def test_the_judge_finds_nothing_in_exact_profiles_and_more_in_coarser_ones() -> None:
    model = make_model()
    layout = BlockLayout(spec_of(model), 32)
    judge = Judge(model, [read_run(model, token_ids(100 + more), token_ids(20, 5)) for more in (0, 7)], layout)
    assert judge.divergence(Codec(layout, Profile.LOSSLESS)) == 0.0
    found = [judge.divergence(Codec(layout, profile)) for profile in (Profile.Q8, Profile.Q4, Profile.Q3, Profile.Q2)]
    assert 0 < found[0] < found[1] < found[2] < found[3]


def test_weighing_channels_by_sensitivity_costs_less_than_equal_steps() -> None:
    language_model = language_model_of()
    model = language_model.model
    layout = BlockLayout(spec_of(model), 128)
    runs = list(runs_of_text(language_model, token_ids(NEEDED_TOKENS)[0].tolist()))
    calibration, decision = calibrate_model(language_model, runs, layout, "a test", with_bases=True)
    assert decision.calibration == calibration.id
    assert calibration.has_bases
    assert decision.num_tokens == 4096
    assert set(decision.divergence) == set(KL_LIMITS)
    judge = Judge(model, runs[NUM_FITTED:], layout)
    plain, weighted = (judge.divergence(Codec(layout, Profile.Q2, each)) for each in (None, calibration))
    assert weighted < plain


def test_profiles_beyond_their_limit_get_exact_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = language_model_of()
    layout = BlockLayout(spec_of(language_model.model), 128)
    runs = list(runs_of_text(language_model, token_ids(NEEDED_TOKENS)[0].tolist()))
    monkeypatch.setattr(calibrating, "KL_LIMITS", {"q8": 1.0, "q2": 0.0})
    monkeypatch.setattr(calibrating, "KL_AIMS", {"q2": 0.0})
    _, decision = calibrate_model(language_model, runs, layout, "a test")
    assert set(decision.exact_keys) == {"q2"}
    assert 0 < decision.exact_keys["q2"] < decision.divergence["q2"]
    assert decision.steps == {}


def test_steps_are_as_coarse_as_the_aim_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = language_model_of()
    layout = BlockLayout(spec_of(language_model.model), 128)
    runs = list(runs_of_text(language_model, token_ids(NEEDED_TOKENS)[0].tolist()))
    usual = STEPS[Profile.Q2]
    found = {}
    for aim in (0.0, 1.0):
        monkeypatch.setattr(calibrating, "KL_AIMS", {"q2": aim})
        found[aim] = calibrate_model(language_model, runs, layout, "a test")[1]
    assert found[0.0].steps == {}
    assert found[1.0].steps == {"q2": (usual.key_mult - 6, usual.value_mult - 5)}
    assert found[0.0].divergence["q2"] < found[1.0].divergence["q2"]


def test_bases_are_made_and_judged_only_when_asked_for() -> None:
    language_model = language_model_of()
    layout = BlockLayout(spec_of(language_model.model), 128)
    runs = runs_of_text(language_model, token_ids(NEEDED_TOKENS)[0].tolist())
    calibration, decision = calibrate_model(language_model, runs, layout, "a test")
    assert not calibration.has_bases
    assert set(decision.divergence) == set(KL_LIMITS) - {"pca"}


def test_progress_is_told_and_grows_to_the_end() -> None:
    language_model = language_model_of()
    layout = BlockLayout(spec_of(language_model.model), 128)
    runs = runs_of_text(language_model, token_ids(NEEDED_TOKENS)[0].tolist())
    shares: list[float] = []
    calibrate_model(language_model, runs, layout, "a test", shares.append)
    assert len(shares) > 8
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert 0 < shares[1] < 0.1
    assert shares[-1] == 1.0


def test_distributions_that_are_no_numbers_are_told_by_the_profiles_name() -> None:
    language_model = language_model_of()
    layout = BlockLayout(spec_of(language_model.model), 128)
    ids = token_ids(NEEDED_TOKENS)[0]
    runs = list(runs_of_text(language_model, ids[ids != 7].repeat(2)[:NEEDED_TOKENS].tolist()))
    with torch.no_grad():
        language_model.model.model.embed_tokens.weight[7] = torch.nan
    runs[-1].continuation[0, -1] = 7
    with pytest.raises(CalibrationError, match="with q8"):
        calibrate_model(language_model, runs, layout, "a test")
