# SPDX-License-Identifier: Apache-2.0
"""Decodes records that come from elsewhere before they are stored: no key gets what cannot be read."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.codec import probe
from kvstore.errors import CorruptRecordError, KVStoreError
from kvstore.tiers.codec_shelf import CalibrationSource, CodecShelf
from kvstore.tiers.manifest import StreamHeader

_MAX_SLOT_NBYTES = 4 << 30


class RecordCheck:
    """Decodes records of one stream into a slot of its own, made for the first of them. Not thread-safe.

    Args:
        calibrations: where those are that the records name.
        header: of the stream; may come from elsewhere, too.
    """

    def __init__(self, calibrations: CalibrationSource, header: StreamHeader) -> None:
        self._calibrations = calibrations
        self._header = header
        self._made: tuple[CodecShelf, Tensor] | None = None

    def is_sound(self, record: bytes, num_tokens: int) -> bool:
        """Whether `record` is a block of `num_tokens` tokens that a store of the stream's layout can read."""
        try:
            codecs, slot = self._made or self._make()
            info = probe(record)
            codecs.decoder(info).decode(record, slot, num_tokens=num_tokens)
        except KVStoreError:
            return False
        return info.total_nbytes == len(record)

    def _make(self) -> tuple[CodecShelf, Tensor]:
        layout = self._header.layout
        if layout.slot_nbytes > _MAX_SLOT_NBYTES:
            raise CorruptRecordError(f"a stream with blocks of {layout.slot_nbytes} bytes")
        slot = torch.empty(layout.slot_nbytes, dtype=torch.uint8)
        self._made = CodecShelf(self._calibrations, layout, self._header.profile), slot
        return self._made
