# SPDX-License-Identifier: Apache-2.0
"""From a catalogue entry to the bytes that a read needs, and from those bytes to a slot, checked on the way."""

from __future__ import annotations

from torch import Tensor

from kvstore.codec import Codec, plane_span
from kvstore.errors import CorruptRecordError
from kvstore.spec import BlockKey
from kvstore.tiers.codec_shelf import CodecShelf
from kvstore.tiers.disk import Found
from kvstore.tiers.reading.plan import Piece, part_piece, whole_piece
from kvstore.tiers.tables.records import EXTENT_HEADER_NBYTES, unpack_extent_header


def plan_piece(position: int, found: Found, layers: range | None) -> Piece:
    """Say which pages of which file hold a block, or some of its layers.

    Raises:
        CorruptRecordError: the catalogue holds no plane directory, or one that leaves the extent.
    """
    extent = found.record.extent
    if layers is None:
        return whole_piece(position, extent)
    if found.directory is None:
        raise CorruptRecordError("the catalogue holds the block and not its plane directory")
    offset, nbytes = plane_span(Codec.probe(found.directory), layers)
    return part_piece(position, extent, offset, nbytes)


def decode_whole(codecs: CodecShelf, key: BlockKey, found: Found, data: memoryview, slot: Tensor) -> None:
    """Check that an extent holds the block that the catalogue says, and decode it.

    Raises:
        CorruptRecordError: other or damaged bytes.
        SpecMismatchError, UnsupportedFormatError: see `Codec.decode`.
    """
    record = found.record
    header = unpack_extent_header(data)
    if (header.key, header.generation, header.record_nbytes) != (key, record.generation, record.record_nbytes):
        raise CorruptRecordError("the extent holds another record than the catalogue says")
    body = data[EXTENT_HEADER_NBYTES : EXTENT_HEADER_NBYTES + record.record_nbytes]
    info = Codec.probe(body)
    if info.num_tokens != record.num_tokens:
        raise CorruptRecordError(f"record holds {info.num_tokens} tokens; {record.num_tokens} were expected")
    codecs.decoder(info).decode_planes(info, body, 0, slot, layers=range(info.num_layers))


def decode_part(codecs: CodecShelf, found: Found, layers: range, piece: Piece, data: memoryview, slot: Tensor) -> None:
    """Decode some layers from the pages of `plan_piece`; their checksums are in the catalogue's directory.

    Raises:
        CorruptRecordError, SpecMismatchError, UnsupportedFormatError: see `Codec.decode_planes`.
    """
    assert found.directory is not None, "planned with its directory"
    info = Codec.probe(found.directory)
    skipped = EXTENT_HEADER_NBYTES - (piece.start - found.record.extent.offset)
    codec = codecs.decoder(info)
    codec.decode_planes(info, data[max(0, skipped) :], max(0, -skipped), slot, layers=layers)
