# SPDX-License-Identifier: Apache-2.0
"""Calibrates the model at hand from the first words that a lossy stream reads, if nobody has done it before."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstore.calibration import can_have_bases
from kvstore.codec import Profile
from kvstore.engines.calibrating import NEEDED_TOKENS, OnStep, calibrate_model, runs_of_text
from kvstore.engines.loading import LanguageModel
from kvstore.errors import CalibrationError
from kvstore.layout import BlockLayout
from kvstore.store import Store

_LOG = logging.getLogger(__name__)


class FirstWords:
    """Collects token ids until they are enough.

    Args:
        store: open for writing.
        language_model: what reads. One that sees pictures is left to the statistics of its blocks: words alone say
            nothing of visual tokens.
        layout: the stream's.
        profile: the stream's; exact ones need no calibration.
        on_step: see `calibrate_model`.
    """

    def __init__(
        self, store: Store, language_model: LanguageModel, layout: BlockLayout, profile: Profile, on_step: OnStep
    ) -> None:
        self._store = store
        self._language_model = language_model
        self._layout = layout
        self._on_step = on_step
        self._is_wanted = profile.is_lossy and language_model.image_processor is None
        self._with_bases = profile is Profile.PCA and can_have_bases(layout.spec)
        self._ids: list[int] = []
        if profile is Profile.PCA and not self._with_bases:
            _LOG.warning("a layer of the model has more channels than a basis holds; blocks are coded as those of q2")

    def read(self, ids: Sequence[int]) -> None:
        """Take in what the model has just read; with the last token needed, calibrate: later blocks are coded so.

        Reading goes on where that fails: the writer calibrates from the blocks alone (`tiers.writing.calibrator`).
        """
        if not self._is_wanted:
            return
        decision = self._store.calibrations.of_model(self._layout.spec)
        judged = {} if decision is None else decision.divergence
        if judged and (not self._with_bases or Profile.PCA in judged):
            self._is_wanted = False
            return
        self._ids += ids
        if len(self._ids) >= NEEDED_TOKENS:
            read, self._ids, self._is_wanted = self._ids, [], False
            self._calibrate(read)

    def _calibrate(self, ids: Sequence[int]) -> None:
        try:
            made = calibrate_model(
                self._language_model,
                runs_of_text(self._language_model, ids),
                self._layout,
                "the first words read",
                self._on_step,
                with_bases=self._with_bases or self._store.calibrations.has_bases(self._layout.spec),
            )
        except CalibrationError as error:
            _LOG.warning("%s; blocks are coded by what the first ones measured, and nobody judged the profile", error)
            return
        self._store.calibrations.keep(self._layout.spec, *made)
