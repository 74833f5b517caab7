# SPDX-License-Identifier: Apache-2.0
"""What benchmarks are built of: `pca` is measured in bases, and stores that cannot be compared are refused early."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvstore.codec import Profile
from kvstore.layout import BlockLayout
from kvstore.spec import ModelSpec

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_profiles
    from coders import calibrated, codec_coder
    from real_kv import Corpus

LAYOUT = BlockLayout(ModelSpec(4, 1, 16, 16, "bfloat16", "pre", "test", "{}", "0"), 64)


def _text(num_blocks: int) -> Corpus:
    """Blocks of which all layers follow from a few numbers a token."""
    chance = torch.Generator().manual_seed(0)
    mixes = torch.randn(2, 4, 64, generator=chance)
    slots = []
    for _ in range(num_blocks):
        slot = torch.zeros(LAYOUT.slot_nbytes, dtype=torch.uint8)
        hidden = torch.randn(64, 4, generator=chance)
        for view, mix in zip((LAYOUT.keys(slot), LAYOUT.values(slot)), mixes, strict=True):
            noise = 0.1 * torch.randn(64, 64, generator=chance)
            view.copy_((hidden @ mix + noise).view(64, 4, 1, 16).permute(1, 2, 0, 3))
        slots.append(slot)
    return Corpus(LAYOUT, slots, [64] * num_blocks, "a test")


def test_pca_is_measured_in_bases() -> None:
    kv = _text(8)
    calibration = calibrated(kv, with_bases=True)

    pca, q2 = (codec_coder(kv, profile, calibration).nbytes for profile in (Profile.PCA, Profile.Q2))

    assert calibration.has_bases
    assert pca < 0.7 * q2


def test_profiles_are_not_compared_with_a_store_that_answers_nothing() -> None:
    bench_profiles.check_comparable(bench_profiles.Outcome(1, 0, 1, 9))
    for found in (bench_profiles.Outcome(0, 3, 3, 9), bench_profiles.Outcome(3, 3, 0, 9)):
        with pytest.raises(SystemExit, match="longer recording"):
            bench_profiles.check_comparable(found)


def test_lossless_is_no_profile_to_compare_with_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_profiles.py", "--profiles", "lossless"])

    with pytest.raises(SystemExit):
        bench_profiles.main()

    assert "invalid choice" in capsys.readouterr().err
