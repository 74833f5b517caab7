# SPDX-License-Identifier: Apache-2.0
"""The zstd step of profile `zstd`: byte streams of planes <-> frames (csrc/codec/FORMAT.md section 3, coding split)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import zstandard

from kvstore.errors import CorruptRecordError
from kvstore.native import Geometry, split_planes
from kvstore.record import DTYPES, Coding, PlaneInfo
from kvstore.spec import ModelSpec

if TYPE_CHECKING:
    from typing_extensions import Buffer

# FORMAT.md section 3: length fields of a split plane.
_STREAM_LENGTH_NBYTES = 4

# Exponent streams have skewed bytes and few repeats: what pays is the entropy coder, not the match finder. Long minimum
# matches and a tiny table keep accidental matches out: 3 times as fast to encode as level 1, twice as fast to decode,
# and smaller. Runs and repeats are still found.
_ZSTD_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1, strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=8, min_match=7, write_content_size=True
)


class ByteStreams:
    """Compresses and decompresses. Thread-safe; each thread keeps its own contexts and one scratch buffer.

    Args:
        spec: the model's KV geometry.
        geometry: the same, with the block's size.
    """

    def __init__(self, spec: ModelSpec, geometry: Geometry) -> None:
        self._spec = spec
        self._geometry = geometry
        self._local = _ThreadState()

    def deflate(self, slot: Buffer, num_tokens: int) -> tuple[list[bool], list[Buffer]]:
        """Compress all planes of a slot.

        Args:
            slot: a slot of the layout.
            num_tokens: how many of its tokens.

        Returns:
            Which planes shrink, and the stored streams of these, in order.
        """
        spec = self._spec
        scratch = self._local.scratch(num_tokens * spec.token_nbytes)
        split_planes(self._geometry, DTYPES.index(spec.dtype), num_tokens, slot, scratch)
        compress = self._local.compressor.compress
        is_split: list[bool] = []
        streams: list[Buffer] = []
        offset = 0
        for plane in range(2 * spec.num_layers):
            elements = spec.kv_heads * num_tokens * (spec.value_dim if plane % 2 else spec.key_dim)
            stored: list[Buffer] = []
            nbytes = spec.itemsize * _STREAM_LENGTH_NBYTES
            for _ in range(spec.itemsize):
                stream = scratch[offset : offset + elements]
                frame = compress(stream)
                stored.append(frame if len(frame) < elements else stream)
                nbytes += min(len(frame), elements)
                offset += elements
            is_split.append(nbytes < elements * spec.itemsize)
            streams += stored if is_split[-1] else []
        return is_split, streams

    def inflate(
        self, data: memoryview, spans: list[tuple[int, int]], planes: Sequence[PlaneInfo], layers: range
    ) -> list[Buffer]:
        """Decompress the streams of the split planes.

        Args:
            data: part of a record.
            spans: where the streams lie in it, checked by native code.
            planes: the record's directory.
            layers: which of it are in the part.

        Raises:
            CorruptRecordError: a frame is damaged, or states another length than its plane has.
        """
        itemsize = self._spec.itemsize
        wanted = range(2 * layers.start, 2 * layers.stop)
        split = [(at, planes[at].raw_nbytes // itemsize) for at in wanted if planes[at].coding is Coding.SPLIT]
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
