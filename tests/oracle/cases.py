# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: blocks with the settings to encode them, drawn as few numbers that shrink well."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tests.oracle.blocks import FLAVOURS, Geometry, random_block, random_calibration
from tests.oracle.calibration import Calibration
from tests.oracle.elements import Bits, Dtype
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
        return planes, random_calibration(rng, planes, self.dtype) if self.is_calibrated else None


def _geometries(most_layers: int) -> st.SearchStrategy[Geometry]:
    dims = st.one_of(st.sampled_from(_EDGES), st.integers(1, 160))
    tokens = st.one_of(st.sampled_from((1, 2, 4, 5, 15, 16, 19, 20, 64, 130)), st.integers(1, 130))
    return st.builds(Geometry, st.integers(1, most_layers), st.integers(1, 5), dims, dims, tokens)


_MULTS = st.one_of(st.integers(-8, 44), st.integers(-128, 127))


def cases(profiles: tuple[Profile, ...] = tuple(Profile), most_layers: int = 1) -> st.SearchStrategy[Case]:
    settings = st.builds(
        Settings, st.sampled_from(profiles), _MULTS, _MULTS, st.booleans(), st.sampled_from((False, False, True))
    )
    return st.builds(
        Case,
        *(_geometries(most_layers), st.sampled_from(Dtype), st.sampled_from(("kv", "kv", *FLAVOURS)), settings),
        *(st.sampled_from((0, 1, 1 << 63)), st.booleans(), st.integers(0, (1 << 32) - 1)),
    )
