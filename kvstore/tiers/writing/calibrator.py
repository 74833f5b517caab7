# SPDX-License-Identifier: Apache-2.0
"""Calibrates a model from the first blocks that are written of it, for a lossy store that has no calibration yet."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstore.bases import BasisSums
from kvstore.calibration import MIN_TOKENS, SINK_TOKENS, calibrate
from kvstore.codec import Profile
from kvstore.decision import Decision
from kvstore.layout import BlockLayout
from kvstore.moments import Moments
from kvstore.tiers.calibrations import Calibrations
from kvstore.tiers.writing.packing import NewRecord

_LOG = logging.getLogger(__name__)


class Calibrator:
    """Measures blocks as they are written until they are enough; used by the writer's thread.

    Blocks written before are coded without calibration. A process that ends before has measured in vain; the next one
    begins anew.

    Args:
        calibrations: where the calibration is kept.
        layout: layout of the slots.
        profile: how new blocks are coded; exact ones need no calibration.
    """

    def __init__(self, calibrations: Calibrations, layout: BlockLayout, profile: Profile) -> None:
        self._calibrations = calibrations
        self._layout = layout
        spec = layout.spec
        sizes = (spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim)
        self._moments = Moments(*sizes) if profile.is_lossy else None
        self._bases = BasisSums(*sizes, MIN_TOKENS) if profile is Profile.PCA else None

    def measure(self, blocks: Sequence[NewRecord]) -> None:
        """Take in blocks that were written; what is written after the last one needed is coded with the calibration."""
        if self._moments is None:
            return
        spec = self._layout.spec
        if self._calibrations.of_model(spec) is not None:
            self._moments = self._bases = None
            return
        for block in blocks:
            first = min(max(SINK_TOKENS - block.first_token, 0), block.num_tokens)
            tokens = slice(first, block.num_tokens)
            keys, values = self._layout.keys(block.slot), self._layout.values(block.slot)
            for sums in (self._moments, self._bases):
                if sums is not None:
                    sums.add(keys[:, :, tokens], values[:, :, tokens])
        if self._moments.num_tokens >= MIN_TOKENS:
            moments, bases = self._moments, self._bases
            self._moments = self._bases = None  # first: what fails now would fail again with every block
            try:
                calibration = calibrate(moments, bases=bases)
            except RuntimeError as error:  # torch's and LAPACK's; what was measured is no reason to lose a block
                _LOG.warning("not calibrated: %s; blocks go on measuring themselves", error)
                return
            decision = Decision(calibration.id, moments.num_tokens, "the first blocks written")
            # Somebody with the model at hand may have decided meanwhile, and knows better.
            self._calibrations.keep(spec, calibration, decision, replace=False)
