# SPDX-License-Identifier: Apache-2.0
"""Slots <-> records, as csrc/codec/FORMAT.md defines them. Native code does all but the zstd step, which is here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import zstandard
from torch import Tensor

from kvstore.errors import CorruptRecordError, ShapeError, SpecMismatchError
from kvstore.layout import BlockLayout
from kvstore.native import (
    Geometry,
    decode_planes,
    encode_record,
    find_nonfinite,
    open_planes,
    record_bound,
    split_planes,
)
from kvstore.record import (
    DTYPES,
    PROFILES,
    Coding,
    PlaneInfo,
    Profile,
    RecordInfo,
    header_nbytes,
    plane_span,
    planes_of,
    probe,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Codec", "Coding", "PlaneInfo", "Profile", "RecordInfo", "header_nbytes", "plane_span", "probe"]

# FORMAT.md section 3: length fields of a split plane, scales of a q8 plane.
_STREAM_LENGTH_NBYTES = 4
_SCALE_NBYTES = 4

# Exponent streams have skewed bytes and few repeats: what pays is the entropy coder, not the match finder. Long minimum
# matches and a tiny table keep accidental matches out: 3 times as fast to encode as level 1, twice as fast to decode,
# and smaller. Runs and repeats are still found.
_ZSTD_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1, strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=8, min_match=7, write_content_size=True
)


class Codec:
    """Encodes slots of one layout with one profile, and decodes records of that layout.

    Thread-safe; each thread keeps its own zstd contexts and one scratch buffer of a slot's size. Native steps and zstd
    release the GIL, so threads scale with cores.

    Args:
        layout: byte layout of the slots.
        profile: how `encode` stores planes. A bit-exact codec refuses to decode `q8` records.

    Raises:
        ShapeError: a size of `layout` is beyond the format's limits (65535, or 1 GiB a plane).
    """

    def __init__(self, layout: BlockLayout, profile: Profile) -> None:
        spec = layout.spec
        self._layout = layout
        self._profile = profile
        self._dtype = DTYPES.index(spec.dtype)
        self._geometry = Geometry(
            spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim, spec.itemsize, layout.block_tokens
        )
        self._local = _ThreadState()

    def bound(self, num_tokens: int) -> int:
        """Most bytes that a record of `num_tokens` tokens can take.

        Raises:
            ShapeError: not 1 to block_tokens.
        """
        return record_bound(self._geometry, self._dtype, self._checked(num_tokens))

    def encode(self, slot: Tensor, num_tokens: int, first_token: int, out: Buffer) -> int:
        """Write the first `num_tokens` tokens of a slot as a record.

        A plane that does not shrink is stored raw. Under `q8`, a plane that holds an infinity or a NaN is stored
        exactly.

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
        codings, streams = self._plan(source, num_tokens)
        return encode_record(
            self._geometry,
            self._dtype,
            num_tokens,
            PROFILES.index(self._profile),
            first_token,
            source,
            codings,
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
            SpecMismatchError: of another geometry or dtype, or lossy while this codec is bit-exact.
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
        self._check(info)
        planes = planes_of(info, layers)
        destination = self._buffer(slot)
        view = memoryview(data)
        first_plane = 2 * layers.start
        part = (self._geometry, self._dtype, self._checked(info.num_tokens), first_plane, planes, view, data_offset)
        streams = self._inflate(view, open_planes(*part), planes, first_plane)
        decode_planes(*part, streams, destination)

    def _plan(self, slot: Buffer, num_tokens: int) -> tuple[list[Coding], list[Buffer]]:
        """Choose each plane's coding; streams are those of the planes that will be stored as split, in order."""
        spec = self._layout.spec
        num_planes = 2 * spec.num_layers
        match self._profile:
            case Profile.RAW:
                return [Coding.RAW] * num_planes, []
            case Profile.LOSSLESS:
                codings = [Coding.SPLIT] * num_planes
            case Profile.Q8:
                # Codes and scales must be fewer bytes than the elements, as the format demands.
                codings = [
                    Coding.Q8 if _SCALE_NBYTES + dim < dim * spec.itemsize else Coding.SPLIT
                    for dim in (spec.key_dim, spec.value_dim)
                ] * spec.num_layers
                for plane in find_nonfinite(self._geometry, self._dtype, num_tokens, slot):
                    codings[plane] = Coding.SPLIT
        return codings, self._deflate(slot, num_tokens, codings)

    def _deflate(self, slot: Buffer, num_tokens: int, codings: list[Coding]) -> list[Buffer]:
        """Compress the planes marked as split; one that does not shrink is marked as raw instead."""
        planes = [plane for plane, coding in enumerate(codings) if coding is Coding.SPLIT]
        if not planes:
            return []
        spec = self._layout.spec
        scratch = self._local.scratch(num_tokens * spec.token_nbytes)
        split_planes(self._geometry, self._dtype, num_tokens, slot, planes, scratch)
        compress = self._local.compressor.compress
        streams: list[Buffer] = []
        offset = 0
        for plane in planes:
            elements = spec.kv_heads * num_tokens * (spec.value_dim if plane % 2 else spec.key_dim)
            stored: list[Buffer] = []
            nbytes = spec.itemsize * _STREAM_LENGTH_NBYTES
            for _ in range(spec.itemsize):
                stream = scratch[offset : offset + elements]
                frame = compress(stream)
                stored.append(frame if len(frame) < elements else stream)
                nbytes += min(len(frame), elements)
                offset += elements
            if nbytes < elements * spec.itemsize:
                streams += stored
            else:
                codings[plane] = Coding.RAW
        return streams

    def _inflate(
        self, data: memoryview, spans: list[tuple[int, int]], planes: Sequence[PlaneInfo], first_plane: int
    ) -> list[Buffer]:
        """Decompress the streams of the split planes; `spans` are their places in `data`, checked by native code."""
        itemsize = self._layout.spec.itemsize
        split = [(first_plane + i, p.raw_nbytes // itemsize) for i, p in enumerate(planes) if p.coding is Coding.SPLIT]
        streams: list[Buffer] = []
        for index, (offset, nbytes) in enumerate(spans):
            plane, elements = split[index // itemsize]
            stream = data[offset : offset + nbytes]
            streams.append(stream if nbytes == elements else self._decompress(stream, elements, plane))
        return streams

    def _decompress(self, frame: memoryview, nbytes: int, plane: int) -> bytes:
        where = f"{'V' if plane % 2 else 'K'} of layer {plane // 2}"
        try:
            # zstd allocates what the frame states: compare that with the geometry first.
            stated = zstandard.frame_content_size(frame)
            if stated != nbytes:
                raise CorruptRecordError(f"{where} has a stream that states {stated} bytes; it must have {nbytes}")
            return self._local.decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptRecordError(f"{where} has a stream that zstd refuses: {error}") from error

    def _check(self, info: RecordInfo) -> None:
        spec = self._layout.spec
        wanted = (spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim, spec.dtype)
        found = (info.num_layers, info.kv_heads, info.key_dim, info.value_dim, info.dtype)
        if found != wanted:
            raise SpecMismatchError(
                f"record is of (layers, heads, key dim, value dim, dtype) {found}; this layout has {wanted}"
            )
        if info.profile is Profile.Q8 and self._profile is not Profile.Q8:
            raise SpecMismatchError(
                f"record is lossy ({info.profile}); a {self._profile} codec does not answer with it"
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


class _ThreadState(threading.local):
    """What one thread reuses from call to call: contexts that zstd does not share, and memory already faulted in."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_ZSTD_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor()
        self._memory = bytearray()

    def scratch(self, nbytes: int) -> memoryview:
        """`nbytes` bytes of any content, valid until the next call."""
        if len(self._memory) < nbytes:
            self._memory = bytearray(nbytes)
        return memoryview(self._memory)[:nbytes]
