# SPDX-License-Identifier: Apache-2.0
"""The codecs of one layout: the one that encodes, and one for every calibration that records name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from kvstore.calibration import Calibration
from kvstore.codec import Codec, Profile, RecordInfo, Steps
from kvstore.decision import Decision
from kvstore.layout import BlockLayout
from kvstore.native import Calibration as NativeCalibration
from kvstore.native import decode_extents
from kvstore.record import effective
from kvstore.spec import ModelSpec

if TYPE_CHECKING:
    from typing_extensions import Buffer

ExtentInMemory: TypeAlias = tuple[int, int, bytes, int, int, int, int]
"""Offset, nbytes, key, generation, record_nbytes, num_tokens, address of the slot."""


class CalibrationSource(Protocol):
    """Where calibrations and decisions are; `kvstore.tiers.calibrations.Calibrations` is one."""

    def find(self, identity: bytes) -> Calibration | None:
        """The object of an id; None for the id that names none; raises `CorruptRecordError` when it is not there."""
        ...

    def of_model(self, spec: ModelSpec) -> Decision | None:
        """What was decided for a model; None before something is."""
        ...


class CodecShelf:
    """Makes codecs as they are needed, and keeps them. Thread-safe.

    Args:
        calibrations: where objects and decisions are found.
        layout: layout of the slots.
        profile: how new blocks are coded.
    """

    def __init__(self, calibrations: CalibrationSource, layout: BlockLayout, profile: Profile) -> None:
        self._calibrations = calibrations
        self._layout = layout
        self.profile = profile
        self._plain = Codec(layout, profile)
        self._decoders: dict[bytes, Codec] = {}
        self._loaded: tuple[NativeCalibration, ...] = ()  # those of the decoders
        self._coding = self._plain.writer(layout.block_tokens)[:2]
        self._decided: tuple[Decision | None, Codec] = (None, self._plain)

    def bound(self, num_tokens: int) -> int:
        """Most bytes that a record of `num_tokens` tokens can take."""
        return self._plain.bound(num_tokens)

    def encoder(self) -> Codec:
        """The codec for new blocks: with what was decided for the model, as soon as something is.

        Raises:
            CorruptRecordError: the decision or its calibration is damaged.
        """
        if not self.profile.is_lossy:
            return self._plain
        decision = self._calibrations.of_model(self._layout.spec)
        followed, codec = self._decided
        if decision is not None and decision is not followed:
            calibration = self._calibrations.find(decision.calibration)
            assert calibration is not None, "a decision names an object"
            judged = effective(self.profile, calibration.has_bases)
            steps = Steps(*decision.steps[judged]) if judged in decision.steps else None
            exact_keys = judged in decision.exact_keys
            codec = Codec(self._layout, self.profile, calibration, steps, exact_keys=exact_keys)
            self._decided = (decision, codec)
        return codec

    def decoder(self, info: RecordInfo) -> Codec:
        """The codec that reads a record.

        Raises:
            CorruptRecordError: it needs a calibration that the store does not hold.
            SpecMismatchError: that calibration is of another geometry.
        """
        codec = self._decoders.get(info.calibration_id)
        if codec is None:
            calibration = self._calibrations.find(info.calibration_id)
            codec = Codec(self._layout, self.profile, calibration)
            self._decoders[info.calibration_id] = codec
            if calibration is not None:
                self._loaded = (*self._loaded, calibration.native)
        return codec

    def decode_extents(self, memory: Buffer, extents: Sequence[ExtentInMemory]) -> list[int]:
        """Decode whole blocks to slots, each if nothing stands against it.

        Args:
            memory: where the extents are.
            extents: as `kvstore.native.decode_extents` takes them.

        Returns:
            Numbers of those that were left alone: `decoder` and the codec say why, or can decode them.
        """
        return decode_extents(*self._coding, self.profile.is_lossy, self._loaded, memory, extents)
