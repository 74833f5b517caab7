# SPDX-License-Identifier: Apache-2.0
"""What is measured of keys and values, and the calibrations made of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.calibration import MIN_TOKENS, calibrate
from kvstore.errors import ConfigError, ShapeError
from kvstore.moments import Moments, PlaneParameters


def _stream(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys with a mean, a sigma and a correlation per channel; values whose rows differ in size."""
    chance = torch.Generator().manual_seed(seed)
    sigma = 2.0 ** torch.linspace(-1, 1, 8)
    rho = torch.linspace(0.0, 0.9, 8)
    noise = torch.randn(2, 2, num_tokens, 8, generator=chance)
    keys = torch.empty_like(noise)
    keys[:, :, 0] = noise[:, :, 0]
    for token in range(1, num_tokens):
        keys[:, :, token] = rho * keys[:, :, token - 1] + (1 - rho.square()).sqrt() * noise[:, :, token]
    keys = keys * sigma + torch.arange(8) - 3.5
    rows = 2.0 ** torch.randint(-3, 4, (2, 2, num_tokens, 1), generator=chance)
    values = torch.randn(2, 2, num_tokens, 5, generator=chance) * 2.0 ** torch.linspace(-1, 1, 5) * rows
    return keys, values


def _moments(keys: Tensor, values: Tensor, block_tokens: int = 64) -> Moments:
    moments = Moments(2, 2, 8, 5)
    for block in zip(keys.split(block_tokens, dim=2), values.split(block_tokens, dim=2), strict=True):
        moments.add(*block)
    return moments


def _planes(keys: Tensor, values: Tensor) -> list[PlaneParameters]:
    return _moments(keys, values).planes()


def test_measures_the_statistics_that_the_tokens_were_made_with() -> None:
    keys, values = _planes(*_stream(MIN_TOKENS * 2))[2:]
    sigma = 2.0 ** torch.linspace(-1, 1, 8)
    rms = sigma.square().mean().sqrt()
    rho = torch.linspace(0.0, 0.9, 8)
    assert (keys.log_rms - 8 * rms.log2()).abs().max() < 1
    assert (keys.mean.float() - torch.arange(8) + 3.5).abs().max() < 0.2
    assert (keys.log_sigma - 32 * (sigma / rms).log2()).abs().max() < 4
    assert (keys.rho / 256 - rho).abs().max() < 0.05
    residual = sigma * (1 - rho.square()).sqrt()
    assert (keys.log_residual - 32 * (residual / rms).log2()).abs().max() < 4
    # Values: relative to their row, so the sizes of the rows do not count.
    wanted = 32 * torch.linspace(-1, 1, 5)
    assert (values.log_sigma.float() - values.log_sigma.float().mean() - wanted).abs().max() < 12
    assert torch.equal(values.log_residual, values.log_sigma)
    assert int(values.rho.max()) == 0


def test_without_a_model_keys_that_vary_more_get_smaller_steps() -> None:
    keys, values = _planes(*_stream(512))[:2]
    octaves = keys.log_step.double() / 8
    assert (octaves + 0.75 * torch.linspace(-1, 1, 8)).abs().max() < 0.2
    assert int(values.log_step.abs().max()) == 0


def test_does_not_depend_on_how_the_stream_is_cut_beyond_pairs_that_are_cut_apart() -> None:
    keys, values = _stream(256)
    whole, cut = _moments(keys, values, 256).planes()[0], _moments(keys, values, 64).planes()[0]
    for name in ("log_rms", "mean", "log_sigma"):
        assert torch.equal(getattr(whole, name), getattr(cut, name)), name
    assert int((whole.rho.int() - cut.rho.int()).abs().max()) < 16


def test_blocks_of_one_token_and_of_none_are_fine() -> None:
    keys, values = _stream(64)
    moments = _moments(keys, values, 1)
    moments.add(keys[:, :, :0], values[:, :, :0])
    assert moments.num_tokens == 64
    assert int(moments.planes()[0].rho.max()) == 0


def test_infinities_and_nans_count_as_zero() -> None:
    keys, values = _stream(128)
    keys[0, 0, 5, 0], keys[0, 0, 6, 1], values[1, 1, 7, 2] = torch.inf, torch.nan, -torch.inf
    zeroed_keys, zeroed_values = keys.nan_to_num(0, 0, 0), values.nan_to_num(0, 0, 0)
    made = calibrate(_moments(keys, values), min_tokens=1)
    assert made.data == calibrate(_moments(zeroed_keys, zeroed_values), min_tokens=1).data


def test_channels_and_heads_of_zeros_are_described_too() -> None:
    keys, values = _stream(128)
    keys[:, 0], values[:, 1], keys[:, 1, :, 2] = 0.0, 0.0, 0.0
    planes = _planes(keys, values)
    assert planes[0].log_rms[0] == -800
    assert planes[0].log_sigma[1, 2] == -128
    assert planes[1].log_rms[1] == -800
    calibrate(_moments(keys, values), min_tokens=1)


@pytest.mark.parametrize(("num_tokens", "is_enough"), [(MIN_TOKENS - 1, False), (MIN_TOKENS, True)])
def test_too_few_tokens_are_no_calibration(num_tokens: int, is_enough: bool) -> None:
    moments = _moments(torch.randn(2, 2, num_tokens, 8), torch.randn(2, 2, num_tokens, 5))
    if is_enough:
        calibrate(moments)
    else:
        with pytest.raises(ConfigError, match=str(MIN_TOKENS)):
            calibrate(moments)


def test_takes_steps_as_they_are_given_and_refuses_those_of_another_shape() -> None:
    moments = _moments(*_stream(128))
    steps = torch.full((2, 2, 8), 3, dtype=torch.int8), torch.full((2, 2, 5), -2, dtype=torch.int8)
    planes = moments.planes(steps)
    assert planes[2].log_step.unique().tolist() == [3]
    assert planes[3].log_step.unique().tolist() == [-2]
    for wrong in ((steps[1], steps[0]), (steps[0].float(), steps[1])):
        with pytest.raises(ShapeError, match="log_steps"):
            moments.planes(wrong)
