# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: blocks with the settings to encode them, drawn as few numbers that shrink well."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tests.oracle.blocks import FLAVOURS, Geometry, random_block, random_calibration
from tests.oracle.calibration import Calibration
from tests.oracle.elements import Bits, Dtype
from tests.oracle.random_bases import with_random_bases
from tests.oracle.record import Profile
from tests.oracle.writer import Settings

_EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 80, 127, 128, 129)


@dataclass(frozen=True, slots=True)
class Case:
    """A block, drawn from `seed`, and how to store it."""

    geometry: Geometry
    dtype: Dtype
    flavour: str
    settings: Settings
    first_token: int
    is_calibrated: bool
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def block(self) -> tuple[list[Bits], Calibration | None]:
        rng = self.rng
        planes = random_block(rng, self.geometry, self.dtype, self.flavour)
        if not self.is_calibrated:
            return planes, None
        calibration = random_calibration(rng, planes, self.dtype)
        if self.settings.profile is Profile.PCA:
            calibration = with_random_bases(rng, planes, calibration, self.dtype)
        return planes, calibration


def _geometries(most_layers: int) -> st.SearchStrategy[Geometry]:
    dims = st.one_of(st.sampled_from(_EDGES), st.integers(1, 160))
    tokens = st.one_of(st.sampled_from((1, 2, 4, 5, 15, 16, 19, 20, 64, 130)), st.integers(1, 130))
    return st.builds(Geometry, st.integers(1, most_layers), st.integers(1, 5), dims, dims, tokens)


_GROUP_MULTS = st.one_of(st.integers(-16, 24), st.integers(-128, 127))
_MULTS = st.one_of(st.integers(-8, 44), st.integers(-128, 127))


def _small_geometries() -> st.SearchStrategy[Geometry]:
    dims = st.one_of(st.sampled_from((1, 31, 32, 33, 65)), st.integers(1, 40))
    tokens = st.one_of(st.sampled_from((1, 2, 5, 31, 32, 33)), st.integers(1, 40))
    return st.builds(Geometry, st.integers(1, 4), st.integers(1, 3), dims, dims, tokens)


def group_cases() -> st.SearchStrategy[Case]:
    """Blocks of a few small layers, calibrated with bases over some of them."""
    settings = st.builds(Settings, st.just(Profile.PCA), _GROUP_MULTS, _GROUP_MULTS, st.just(False), st.booleans())
    return st.builds(
        Case,
        *(_small_geometries(), st.sampled_from(Dtype), st.sampled_from(("kv", "kv", "kv", *FLAVOURS)), settings),
        *(st.sampled_from((0, 1)), st.just(True), st.integers(0, (1 << 32) - 1)),
    )


def cases(profiles: tuple[Profile, ...] = tuple(Profile), most_layers: int = 1) -> st.SearchStrategy[Case]:
    settings = st.builds(
        Settings, st.sampled_from(profiles), _MULTS, _MULTS, st.booleans(), st.sampled_from((False, False, True))
    )
    return st.builds(
        Case,
        *(_geometries(most_layers), st.sampled_from(Dtype), st.sampled_from(("kv", "kv", *FLAVOURS)), settings),
        *(st.sampled_from((0, 1, 1 << 63)), st.booleans(), st.integers(0, (1 << 32) - 1)),
    )
