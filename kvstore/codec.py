# SPDX-License-Identifier: Apache-2.0
"""Slots <-> records, as csrc/codec/FORMAT.md defines them. Native code does all but the zstd step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstore.byte_streams import ByteStreams
from kvstore.calibration import Calibration
from kvstore.errors import ConfigError, CorruptRecordError, ShapeError, SpecMismatchError
from kvstore.layout import TORCH_DTYPE, BlockLayout
from kvstore.native import (
    Geometry,
    RecordPart,
    decode_planes,
    decode_rows,
    encode_record,
    open_planes,
    record_bound,
)
from kvstore.record import (
    DTYPES,
    PROFILES,
    Coding,
    PlaneInfo,
    Profile,
    RecordInfo,
    Steps,
    header_nbytes,
    layer_bounds,
    plane_span,
    probe,
    usual_steps,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvstore.native import Calibration as NativeCalibration

__all__ = ["Codec", "Coding", "PlaneInfo", "Profile", "RecordInfo", "Steps", "header_nbytes", "plane_span", "probe"]


class Codec:
    """Encodes slots of one layout with one profile, and decodes records of that layout.

    Thread-safe; each thread keeps its own zstd contexts and one scratch buffer of a slot's size. Native steps and zstd
    release the GIL, so threads scale with cores.

    Args:
        layout: byte layout of the slots.
        profile: how `encode` stores planes. A bit-exact codec refuses to decode lossy records.
        calibration: what the model's K and V look like; lossy profiles are smaller with it, and can read what was
            written with it.
        steps: of a lossy profile, instead of its usual ones.
        exact_keys: under a lossy profile, store K exactly: for models that mind errors in it more than others.

    Raises:
        ShapeError: a size of `layout` is beyond the format's limits (65535, or 1 GiB a plane).
        ConfigError: `steps` for a profile that has none.
        SpecMismatchError: `calibration` is of another geometry.
    """

    def __init__(
        self,
        layout: BlockLayout,
        profile: Profile,
        calibration: Calibration | None = None,
        steps: Steps | None = None,
        *,
        exact_keys: bool = False,
    ) -> None:
        spec = layout.spec
        if steps is not None and not profile.is_lossy:
            raise ConfigError(f"steps are for lossy profiles; {profile} is bit-exact")
        if calibration is not None:
            calibration.check_spec(spec)
        self._layout = layout
        self._profile = profile
        self._calibration = calibration
        chosen = steps or usual_steps(profile, None if calibration is None else calibration.has_bases)
        self._steps = (chosen.key_mult, chosen.value_mult, chosen.has_channel_values, exact_keys)
        self._dtype = DTYPES.index(spec.dtype)
        self._geometry = Geometry(
            spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim, spec.itemsize, layout.block_tokens
        )
        self._streams = ByteStreams(spec, self._geometry)

    def bound(self, num_tokens: int) -> int:
        """Most bytes that a record of `num_tokens` tokens can take.

        Raises:
            ShapeError: not 1 to block_tokens.
        """
        return record_bound(self._geometry, self._dtype, self._checked(num_tokens))

    def encode(self, slot: Tensor, num_tokens: int, first_token: int, out: Buffer) -> int:
        """Write the first `num_tokens` tokens of a slot as a record.

        A plane that does not shrink is stored raw. Lossy profiles keep infinities, NaNs and whatever their alphabet
        cannot hold exactly, and the first tokens of a stream.

        Args:
            slot: [slot_nbytes] uint8, CPU, contiguous.
            num_tokens: 1 to block_tokens.
            first_token: position of the block's first token in its stream, 0 to 2^64 - 1.
            out: writable, at least `bound(num_tokens)` bytes to be sure of room.

        Returns:
            Bytes written to the start of `out`.

        Raises:
            ShapeError: an argument does not fit, or `out` is too small for this record.
        """
        self._checked(num_tokens)
        if not 0 <= first_token < 1 << 64:
            raise ShapeError(f"first_token is {first_token}; it must be 0 to 2^64 - 1")
        source = self._buffer(slot)
        is_split, streams = self._streams.deflate(source, num_tokens) if self._profile is Profile.ZSTD else ([], [])
        return encode_record(
            self._geometry,
            self._dtype,
            num_tokens,
            PROFILES.index(self._profile),
            self._steps,
            self._native_calibration,
            first_token,
            source,
            is_split,
            streams,
            out,
        )

    probe = staticmethod(probe)

    def decode(self, record: Buffer, slot: Tensor, *, num_tokens: int, layers: range | None = None) -> None:
        """Write a record's tokens into a slot; rows past `num_tokens` and other layers are not touched.

        The planes' checksums are verified before the first byte is written.

        Args:
            record: the record; what follows its `total_nbytes` is ignored.
            slot: [slot_nbytes] uint8, CPU, contiguous.
            num_tokens: tokens that the caller expects the record to hold.
            layers: consecutive layers to decode; None for all.

        Raises:
            CorruptRecordError: damaged, cut off, or not a record of `num_tokens` tokens; the message names the plane.
            UnsupportedFormatError: see `probe`.
            SpecMismatchError: of another geometry or dtype, lossy while this codec is bit-exact, or written with a
                calibration that this codec does not have.
            ShapeError: an argument does not fit.
        """
        data = memoryview(record)
        info = probe(data)
        if info.num_tokens != num_tokens:
            raise CorruptRecordError(f"record holds {info.num_tokens} tokens; {num_tokens} were expected")
        self.decode_planes(info, data, 0, slot, layers=layers if layers is not None else range(info.num_layers))

    def decode_planes(self, info: RecordInfo, data: Buffer, data_offset: int, slot: Tensor, *, layers: range) -> None:
        """Decode a run of layers from a part of a record; see `decode`.

        Args:
            info: the record's header.
            data: bytes of the record from `data_offset` on, reaching at least to the end of `plane_span(info, layers)`.
            data_offset: position of `data` in the record.
            slot: [slot_nbytes] uint8, CPU, contiguous.
            layers: consecutive layers, at least one.

        Raises:
            CorruptRecordError: a plane is damaged or cut off.
            SpecMismatchError: see `decode`.
            ShapeError: an argument does not fit.
        """
        opened = self._open(info, data, data_offset, layers)
        decode_planes(*opened, self._native_calibration, self._buffer(slot))

    def decode_rows(
        self,
        info: RecordInfo,
        data: Buffer,
        data_offset: int,
        keys: Tensor,
        values: Tensor,
        *,
        layers: range,
        heads: range,
        tokens: range,
    ) -> None:
        """Decode layers, heads and tokens of a record to anywhere; see `decode_planes`.

        Args:
            info: the record's header.
            data: as in `decode_planes`.
            data_offset: position of `data` in the record.
            keys: [layers, heads, tokens, key_dim], CPU, of the layout's dtype; any strides, rows contiguous.
            values: [layers, heads, tokens, value_dim], likewise.
            layers: consecutive layers, at least one.
            heads: consecutive heads.
            tokens: consecutive tokens, counted in the block.

        Raises:
            CorruptRecordError: a plane is damaged or cut off.
            SpecMismatchError: see `decode`.
            ShapeError: an argument does not fit.
        """
        if heads.step != 1 or tokens.step != 1 or min(heads.start, tokens.start) < 0:
            raise ShapeError(f"heads {heads} and tokens {tokens} must be consecutive")
        wanted = (heads.start, len(heads), tokens.start, len(tokens))
        opened = self._open(info, data, data_offset, layers)
        decode_rows(*opened, self._native_calibration, wanted, self._rows(keys), self._rows(values))

    def part(
        self, info: RecordInfo, data: Buffer, data_offset: int, layers: range
    ) -> tuple[Geometry, int, int, RecordPart, NativeCalibration | None]:
        """Describe a run of layers to the native decoders: geometry, dtype, tokens, where they lie, calibration.

        Raises:
            SpecMismatchError: see `decode`.
            ShapeError: an argument does not fit.
        """
        self._check(info)
        first, end = layer_bounds(layers)
        self._check_calibration(info, first, end)
        part = info.directory.part(first, end, data, data_offset)
        return self._geometry, self._dtype, self._checked(info.num_tokens), part, self._native_calibration

    def writer(
        self, num_tokens: int
    ) -> tuple[Geometry, int, int, int, tuple[int, int, bool, bool], NativeCalibration | None]:
        """Describe what `encode` does to the native encoders: geometry, dtype, tokens, profile, steps, calibration.

        Raises:
            ShapeError: `num_tokens` is not 1 to block_tokens.
        """
        profile = PROFILES.index(self._profile)
        tokens = self._checked(num_tokens)
        return self._geometry, self._dtype, tokens, profile, self._steps, self._native_calibration

    def _open(
        self, info: RecordInfo, data: Buffer, data_offset: int, layers: range
    ) -> tuple[Geometry, int, int, RecordPart, list[Buffer]]:
        """Verify a part of a record; returns what decoding it takes."""
        geometry, dtype, num_tokens, part, _ = self.part(info, data, data_offset, layers)
        found = open_planes(geometry, dtype, num_tokens, part)
        streams = self._streams.inflate(memoryview(data), found, info.planes, layers) if found else []
        return geometry, dtype, num_tokens, part, streams

    @property
    def _native_calibration(self) -> NativeCalibration | None:
        return None if self._calibration is None else self._calibration.native

    def _check(self, info: RecordInfo) -> None:
        spec = self._layout.spec
        wanted = (spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim, spec.dtype)
        found = (info.num_layers, info.kv_heads, info.key_dim, info.value_dim, info.dtype)
        if found != wanted:
            raise SpecMismatchError(
                f"record is of (layers, heads, key dim, value dim, dtype) {found}; this layout has {wanted}"
            )
        if info.profile.is_lossy and not self._profile.is_lossy:
            raise SpecMismatchError(
                f"record is lossy ({info.profile}); a {self._profile} codec does not answer with it"
            )

    def _check_calibration(self, info: RecordInfo, first: int, end: int) -> None:
        """Refuse planes that were written with a calibration which this codec does not have."""
        own = None if self._calibration is None else self._calibration.id
        if info.calibration_id != own and info.directory.needs_calibration(first, end):
            raise SpecMismatchError(
                f"record was written with calibration {info.calibration_id.hex()}; this codec has "
                f"{'none' if own is None else own.hex()}"
            )

    def _checked(self, num_tokens: int) -> int:
        if not 1 <= num_tokens <= self._layout.block_tokens:
            raise ShapeError(f"num_tokens is {num_tokens}; a slot has room for 1 to {self._layout.block_tokens}")
        return num_tokens

    def _buffer(self, slot: Tensor) -> memoryview:
        nbytes = self._layout.slot_nbytes
        fits = slot.dtype == torch.uint8 and slot.shape == (nbytes,) and slot.is_contiguous() and slot.is_cpu
        if not fits:
            raise ShapeError(
                f"a slot is [{nbytes}] uint8, contiguous, on cpu; got {list(slot.shape)} {slot.dtype} on {slot.device}"
            )
        return slot.numpy().data

    def _rows(self, rows: Tensor) -> Buffer:
        if rows.dtype != TORCH_DTYPE[self._layout.spec.dtype] or not rows.is_cpu:
            raise ShapeError(f"rows are {self._layout.spec.dtype} on cpu; got {rows.dtype} on {rows.device}")
        return rows.view(torch.int32 if self._layout.spec.itemsize == 4 else torch.int16).numpy().data
