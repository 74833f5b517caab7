# SPDX-License-Identifier: Apache-2.0
"""A shared stream as bytes: a head, and pages of entries with their summaries that never change once they are full."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore.calibration import CALIBRATION_ID_NBYTES
from kvstore.decision import Decision
from kvstore.errors import CorruptRecordError
from kvstore.tiers.manifest import JSON, StreamHeader, dump_json, load_json
from kvstore.tiers.tables.records import Entry, pack_entry, unpack_entry

PAGE_ENTRIES = 64

_VERSION = 1
_NAME_NBYTES = 32
_MAX_CALIBRATIONS = 256
_SUMMARY = struct.Struct("<I")
_ENTRY_NBYTES = len(pack_entry(Entry(0, bytes(32), 0, 0, 0.0, 0.0, 0)))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class StreamHead:
    """What a puller reads first.

    Args:
        header: the stream's.
        num_entries: in all pages.
        num_tokens: of all entries.
        cursor: where the producer stood when it was pushed.
        pages: `page_name` of each.
        calibrations: ids of those that its records name.
        decision: how the model's new blocks are coded, if that is decided.
    """

    header: StreamHeader
    num_entries: int
    num_tokens: int
    cursor: Mapping[str, JSON]
    pages: Sequence[bytes]
    calibrations: Sequence[bytes]
    decision: Decision | None

    def to_json(self) -> bytes:
        """Encode."""
        fields = {
            "version": _VERSION,
            "header": json.loads(self.header.to_json()),
            "num_entries": self.num_entries,
            "num_tokens": self.num_tokens,
            "cursor": dict(self.cursor),
            "pages": [name.hex() for name in self.pages],
            "calibrations": [identity.hex() for identity in self.calibrations],
            "decision": None if self.decision is None else json.loads(self.decision.to_json()),
        }
        return dump_json(fields, "StreamHead")

    @staticmethod
    def from_json(name: str, data: bytes) -> StreamHead:
        """Inverse of `to_json`.

        Raises:
            CorruptRecordError: not the head of a stream called `name`.
        """
        fields = load_json(data, f"head of the remote stream {name!r}")
        try:
            if fields["version"] != _VERSION:
                raise CorruptRecordError(f"remote stream {name!r}: version {fields['version']}, not {_VERSION}")
            pages, calibrations, cursor = fields["pages"], fields["calibrations"], fields["cursor"]
            num_entries, num_tokens, decision = fields["num_entries"], fields["num_tokens"], fields["decision"]
            if not (isinstance(pages, list) and isinstance(calibrations, list) and isinstance(cursor, dict)):
                raise CorruptRecordError(f"remote stream {name!r}: fields that no writer makes")
            if not (isinstance(num_entries, int) and isinstance(num_tokens, int)):
                raise CorruptRecordError(f"remote stream {name!r}: counts that are no numbers")
            if len(calibrations) > _MAX_CALIBRATIONS:
                raise CorruptRecordError(f"remote stream {name!r}: {len(calibrations)} calibrations")
            if num_entries < 0 or len(pages) != -(-num_entries // PAGE_ENTRIES):
                raise CorruptRecordError(f"remote stream {name!r}: {len(pages)} pages of {num_entries} entries")
            return StreamHead(
                _header(name, fields["header"]),
                num_entries,
                num_tokens,
                cursor,
                _names(pages, _NAME_NBYTES),
                _names(calibrations, CALIBRATION_ID_NBYTES),
                None if decision is None else Decision.from_json(json.dumps(decision).encode()),
            )
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise CorruptRecordError(f"remote stream {name!r}: {error}") from error


def page_name(data: bytes) -> bytes:
    """32 bytes that name a page by its content."""
    return hashlib.blake2b(data, digest_size=_NAME_NBYTES).digest()


def pack_page(entries: Sequence[Entry], summaries: Sequence[bytes]) -> bytes:
    """Encode entries and their summaries."""
    parts = []
    for entry, summary in zip(entries, summaries, strict=True):
        parts += [pack_entry(entry), _SUMMARY.pack(len(summary)), summary]
    return b"".join(parts)


def unpack_page(data: bytes, first: int) -> tuple[list[Entry], list[bytes]]:
    """Inverse of `pack_page`.

    Args:
        data: the page.
        first: index of its first entry.

    Raises:
        CorruptRecordError: cut off, or not a page.
    """
    entries: list[Entry] = []
    summaries: list[bytes] = []
    at = 0
    while at < len(data):
        body = at + _ENTRY_NBYTES + _SUMMARY.size
        if body > len(data):
            raise CorruptRecordError(f"page of a remote stream: {len(data)} bytes, cut off")
        (nbytes,) = _SUMMARY.unpack_from(data, body - _SUMMARY.size)
        if nbytes > len(data) - body:
            raise CorruptRecordError(f"page of a remote stream: a summary of {nbytes} bytes goes beyond it")
        entries.append(unpack_entry(first + len(entries), data[at : at + _ENTRY_NBYTES]))
        summaries.append(data[body : body + nbytes])
        at = body + nbytes
    return entries, summaries


def _header(name: str, fields: JSON) -> StreamHeader:
    header = StreamHeader.from_json(name, json.dumps(fields).encode())
    spec = header.spec
    words = (header.prefill, spec.dtype, spec.key_space, spec.architecture, spec.rope, spec.revision)
    if not (all(isinstance(word, str) for word in words) and isinstance(header.source, dict)):
        raise CorruptRecordError(f"remote stream {name!r}: a header that no writer makes")
    header.to_json()  # what cannot be encoded again cannot be stored
    return header


def _names(words: Sequence[JSON], nbytes: int) -> list[bytes]:
    names = [bytes.fromhex(str(word)) for word in words]
    if any(len(name) != nbytes for name in names):
        raise ValueError(f"a name is not of {nbytes} bytes")
    return names
