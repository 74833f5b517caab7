# SPDX-License-Identifier: Apache-2.0
"""Packed values of the catalogue and the extent header: bytes <-> frozen values, every length checked on read.

All integers of values are little-endian; integers inside keys are big-endian, so that keys sort by number.
The layout is documented in docs/file-format.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.layout import ALIGNMENT, round_up
from kvstore.native import crc32c
from kvstore.spec import BLOCK_KEY_NBYTES, BlockKey
from kvstore.tiers.base import Extent

VALUE_VERSION = 1
_BODY_VERSION = 2  # of a value of table `blocks` that tells of the body of an object: older programs refuse it alone
EXTENT_MAGIC = b"KVXT"
EXTENT_HEADER_NBYTES = 64
MAX_RECORD_NBYTES = 1 << 40

# version, num_tokens, file id, references, offset, record bytes, generation, stamp
_BLOCK = struct.Struct("<BxxxIIIQQQQ")
_ENTRY = struct.Struct("<BxxxI32sQddq")  # version, num_tokens, key, first_token, start_s, end_s, group
_STATE = struct.Struct("<BxxxIQQ")  # version, cursor bytes, num_entries, num_tokens; then the cursor
_EXTENT_VALUE = struct.Struct("<Q32s")  # bytes, key
_EXTENT_KEY = struct.Struct(">IQ")  # file id, offset
_POSITION_KEY = struct.Struct(">QQ")  # stream id, index
_EXTENT_HEADER = struct.Struct("<4sHxxQQ32sI")  # magic, version, generation, record bytes, key, CRC of the record
_STAMP = struct.Struct(">Q")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """Where a block's record, or the body of an object, lies and who needs it.

    Args:
        num_tokens: tokens in the block; 0 for the body of an object.
        extent: its place, header and padding included.
        record_nbytes: bytes of the record behind the extent header.
        generation: number of the write that filled the extent; unique in the life of a store.
        references: stream entries that name the block, or streams whose object it is the body of; 0 for a block that
            only `put` knows.
        stamp: last use, for eviction; meaningful only while `references` is 0.
    """

    num_tokens: int
    extent: Extent
    record_nbytes: int
    generation: int
    references: int
    stamp: int

    @property
    def is_object(self) -> bool:
        """True for the body of an object, which is no block."""
        return self.num_tokens == 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One block of a stream's manifest.

    Args:
        index: position in the stream, from 0 without gaps.
        key: the block.
        num_tokens: tokens in the block.
        first_token: position of its first token in the stream.
        start_s: where the block's media begins, in seconds.
        end_s: where it ends.
        group: number of the frame group it was cut from; -1 for text.
    """

    index: int
    key: BlockKey
    num_tokens: int
    first_token: int
    start_s: float
    end_s: float
    group: int


@dataclass(frozen=True, slots=True)
class StreamState:
    """What grows in a stream: how many entries and tokens are durable, and where the producer stands (JSON)."""

    num_entries: int
    num_tokens: int
    cursor_json: bytes


@dataclass(frozen=True, slots=True)
class ExtentHeader:
    """First 64 bytes of an extent: says whose record follows, so that a reused extent is recognised."""

    key: BlockKey
    generation: int
    record_nbytes: int
    record_crc32c: int


ENTRY_NBYTES = _ENTRY.size
"""Bytes of a packed `Entry`."""


def extent_nbytes(record_nbytes: int) -> int:
    """Bytes of the extent that holds a record of `record_nbytes`."""
    return round_up(EXTENT_HEADER_NBYTES + record_nbytes)


def pack_block(record: BlockRecord) -> bytes:
    """Pack a value of table `blocks`."""
    assert record.extent.nbytes == extent_nbytes(record.record_nbytes), "an extent fits its record"
    return _BLOCK.pack(
        _BODY_VERSION if record.is_object else VALUE_VERSION,
        record.num_tokens,
        record.extent.file_id,
        record.references,
        record.extent.offset,
        record.record_nbytes,
        record.generation,
        record.stamp,
    )


def unpack_block(value: bytes) -> BlockRecord:
    """Inverse of `pack_block`.

    Raises:
        CorruptRecordError: wrong length, or fields that no writer produces.
        UnsupportedFormatError: a newer version of the value.
    """
    if len(value) != _BLOCK.size or value[0] not in (VALUE_VERSION, _BODY_VERSION):
        _check(value, _BLOCK, "block record", _BODY_VERSION)
    version, num_tokens, file_id, references, offset, record_nbytes, generation, stamp = _BLOCK.unpack(value)
    if (version == _BODY_VERSION) is not (num_tokens == 0):
        raise CorruptRecordError(f"block record: version {version} with {num_tokens} tokens")
    if offset % ALIGNMENT or record_nbytes > MAX_RECORD_NBYTES or offset > (1 << 62):
        raise CorruptRecordError(f"block record: {record_nbytes} bytes at offset {offset} cannot be an extent")
    extent = Extent(file_id, offset, extent_nbytes(record_nbytes))
    return BlockRecord(num_tokens, extent, record_nbytes, generation, references, stamp)


def pack_entry(entry: Entry) -> bytes:
    """Pack a value of table `entries`; the index is in the key."""
    return _ENTRY.pack(
        VALUE_VERSION, entry.num_tokens, entry.key, entry.first_token, entry.start_s, entry.end_s, entry.group
    )


def unpack_entry(index: int, value: bytes) -> Entry:
    """Inverse of `pack_entry`; raises like `unpack_block`."""
    _check(value, _ENTRY, f"entry {index}")
    _, num_tokens, key, first_token, start_s, end_s, group = _ENTRY.unpack(value)
    if not (math.isfinite(start_s) and math.isfinite(end_s)):
        raise CorruptRecordError(f"entry {index}: its span, {start_s} to {end_s} s, is no time")
    return Entry(index, BlockKey(key), num_tokens, first_token, start_s, end_s, group)


def pack_state(state: StreamState) -> bytes:
    """Pack a value of table `states`."""
    fixed = _STATE.pack(VALUE_VERSION, len(state.cursor_json), state.num_entries, state.num_tokens)
    return fixed + state.cursor_json


def unpack_state(value: bytes) -> StreamState:
    """Inverse of `pack_state`; raises like `unpack_block`."""
    _check(value[: _STATE.size], _STATE, "stream state")
    _, cursor_nbytes, num_entries, num_tokens = _STATE.unpack_from(value)
    if len(value) - _STATE.size != cursor_nbytes:
        raise CorruptRecordError(f"stream state: {len(value) - _STATE.size} bytes of cursor, {cursor_nbytes} announced")
    return StreamState(num_entries, num_tokens, bytes(value[_STATE.size :]))


def pack_stamp(stamp: int) -> bytes:
    """Key of table `lru`."""
    return _STAMP.pack(stamp)


def pack_extent_header(header: ExtentHeader) -> bytes:
    """Pack the first 64 bytes of an extent, as `kvstore.native.seal_extent` does where the record lies behind them."""
    body = _EXTENT_HEADER.pack(
        EXTENT_MAGIC, VALUE_VERSION, header.generation, header.record_nbytes, header.key, header.record_crc32c
    )
    return body + _CRC.pack(crc32c(body))


def unpack_extent_header(data: bytes | memoryview) -> ExtentHeader:
    """Read what `kvstore.native.seal_extent` wrote; `data` may go on behind the header.

    Raises:
        CorruptRecordError: not an intact extent header.
        UnsupportedFormatError: a newer version of it.
    """
    if len(data) < EXTENT_HEADER_NBYTES:
        raise CorruptRecordError(f"extent header: {len(data)} bytes, {EXTENT_HEADER_NBYTES} wanted")
    body = bytes(data[: _EXTENT_HEADER.size])
    magic, version, generation, record_nbytes, key, record_crc = _EXTENT_HEADER.unpack(body)
    if magic != EXTENT_MAGIC:
        raise CorruptRecordError(f"extent header: magic is {magic!r}, not {EXTENT_MAGIC!r}")
    (stored_crc,) = _CRC.unpack_from(data, _EXTENT_HEADER.size)
    if stored_crc != crc32c(body):
        raise CorruptRecordError("extent header: checksum mismatch")
    if version > VALUE_VERSION:
        raise UnsupportedFormatError(f"extent header: version {version}; this program reads up to {VALUE_VERSION}")
    return ExtentHeader(BlockKey(key), generation, record_nbytes, record_crc)


def pack_extent(extent: Extent, key: BlockKey) -> tuple[bytes, bytes]:
    """Pack key and value of table `extents`, which lists what is allocated in disk order."""
    return _EXTENT_KEY.pack(extent.file_id, extent.offset), _EXTENT_VALUE.pack(extent.nbytes, key)


def is_extent(key: bytes, value: bytes) -> bool:
    """Whether `unpack_extent` takes a row."""
    return len(key) == _EXTENT_KEY.size and len(value) == _EXTENT_VALUE.size


def unpack_extent(key: bytes, value: bytes) -> tuple[Extent, BlockKey]:
    """Inverse of `pack_extent`; raises `CorruptRecordError` for a wrong length."""
    if not is_extent(key, value):
        raise CorruptRecordError(f"extent table: key of {len(key)} and value of {len(value)} bytes")
    file_id, offset = _EXTENT_KEY.unpack(key)
    nbytes, block_key = _EXTENT_VALUE.unpack(value)
    return Extent(file_id, offset, nbytes), BlockKey(block_key)


def position_key(stream_id: int, index: int) -> bytes:
    """Key of tables `entries` and `summaries`: sorts by stream, then by index."""
    return _POSITION_KEY.pack(stream_id, index)


def position_index(key: bytes) -> int:
    """Index part of `position_key`; raises `CorruptRecordError` for a wrong length."""
    if len(key) != _POSITION_KEY.size:
        raise CorruptRecordError(f"manifest: key of {len(key)} bytes, {_POSITION_KEY.size} wanted")
    index: int = _POSITION_KEY.unpack(key)[1]
    return index


def check_key(key: bytes) -> BlockKey:
    """Return a key read from disk as `BlockKey`; raises `CorruptRecordError` for a wrong length."""
    if len(key) != BLOCK_KEY_NBYTES:
        raise CorruptRecordError(f"block key: {len(key)} bytes, {BLOCK_KEY_NBYTES} wanted")
    return BlockKey(bytes(key))


def _check(value: bytes, layout: struct.Struct, what: str, newest: int = VALUE_VERSION) -> None:
    if not value:
        raise CorruptRecordError(f"{what}: empty value")
    if value[0] > newest:
        raise UnsupportedFormatError(f"{what}: version {value[0]}; this program reads up to {newest}")
    if not VALUE_VERSION <= value[0] <= newest or len(value) != layout.size:
        raise CorruptRecordError(f"{what}: version {value[0]}, {len(value)} bytes; {layout.size} bytes wanted")
