# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md section 3, coding 1: byte streams of rotated elements, each as it is or as one zstd frame."""

from __future__ import annotations

import struct

import numpy as np
import zstandard

from kvstore.errors import CorruptRecordError
from tests.oracle.elements import Bits, Dtype, rotate, unrotate


def encode_split(bits: Bits) -> bytes:
    """A plane of element bits as stored bytes; other writers' frames may differ."""
    rotated = rotate(bits).reshape(-1)
    streams = [((rotated >> (8 * b)) & 255).astype(np.uint8).tobytes() for b in range(bits.itemsize)]
    frames = [zstandard.compress(stream, 1) for stream in streams]
    stored = [frame if len(frame) < len(stream) else stream for frame, stream in zip(frames, streams, strict=True)]
    return struct.pack(f"<{len(stored)}I", *map(len, stored)) + b"".join(stored)


def decode_split(plane: bytes, dtype: Dtype, shape: tuple[int, int, int]) -> Bits:
    """Element bits of a stored plane.

    Raises:
        CorruptRecordError: a length or a frame is not as section 3 says.
    """
    n = int(np.prod(shape))
    at = 4 * dtype.nbytes
    if len(plane) < at:
        raise CorruptRecordError("split: no room for the lengths")
    lengths = struct.unpack_from(f"<{dtype.nbytes}I", plane)
    if min(lengths) == 0 or max(lengths) > n or sum(lengths) != len(plane) - at:
        raise CorruptRecordError(f"split: lengths {lengths} for streams of {n} bytes")
    rotated = np.zeros(n, dtype=dtype.bits)
    for b, length in enumerate(lengths):
        stored = plane[at : at + length]
        stream = stored if length == n else _inflated(stored, n)
        rotated |= np.frombuffer(stream, np.uint8).astype(dtype.bits) << (8 * b)
        at += length
    return unrotate(rotated).reshape(shape)


def _inflated(frame: bytes, n: int) -> bytes:
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if parameters.content_size != n or parameters.dict_id != 0:
            raise CorruptRecordError(f"split: a frame of {parameters.content_size} bytes; {n} were expected")
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        stream = decompressor.decompress(frame)
    except zstandard.ZstdError as error:
        raise CorruptRecordError(f"split: {error}") from error
    if len(stream) != n or not decompressor.eof or decompressor.unused_data:
        raise CorruptRecordError("split: a frame is cut off, or bytes follow it")
    return stream
