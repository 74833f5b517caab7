# SPDX-License-Identifier: Apache-2.0
"""What is wrapped around every value on a server: who it is, how long it is, and a checksum; docs/remote.md."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum

from kvstore.errors import ConfigError, CorruptRecordError, UnsupportedFormatError
from kvstore.native import crc32c

ENVELOPE_NBYTES = 80
MAX_NAMESPACE_SIGNS = 64

_MAGIC = b"KVXR"
_VERSION = 1
_FIELDS = struct.Struct("<4sHHQ16s32sI8x")  # magic, version, kind, bytes, namespace, key, CRC32C of the payload
_CRC = struct.Struct("<I")
_KEY_NBYTES = 32
_PREFIX = "kvstore1"
assert _FIELDS.size + _CRC.size == ENVELOPE_NBYTES


class Kind(IntEnum):
    """What a value is."""

    BLOCK = 1
    HEAD = 2
    PART = 3


@dataclass(frozen=True, slots=True)
class Namespace:
    """A part of a server's keys that is of no concern to the others.

    Args:
        name: letters, digits, `.`, `_` and `-`; at most 64.
        scope: what else must agree for values to be shared, such as a model's fingerprint; hexadecimal or empty.

    Raises:
        ConfigError: `name` holds other signs, or none, or too many.
    """

    name: str
    scope: str = ""

    def __post_init__(self) -> None:
        is_plain = self.name.isascii() and self.name.replace(".", "").replace("_", "").replace("-", "").isalnum()
        if not is_plain or len(self.name) > MAX_NAMESPACE_SIGNS:
            raise ConfigError(
                f"namespace {self.name[:80]!r}: use 1 to {MAX_NAMESPACE_SIGNS} letters, digits, dots, dashes"
            )

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that values carry."""
        return hashlib.blake2b(f"{self.name}/{self.scope}".encode(), digest_size=16).digest()

    def key(self, kind: Kind, key: bytes) -> str:
        """The server's name of a value."""
        return f"{_PREFIX}:{self.name}:{self.scope}:{kind:d}:{key.hex()}"


def seal(data: memoryview, kind: Kind, namespace: bytes, key: bytes) -> None:
    """Write the envelope in front of a payload that lies in `data` from `ENVELOPE_NBYTES` on.

    Args:
        data: writable; envelope and payload.
        kind: what the payload is.
        namespace: `Namespace.fingerprint`.
        key: 32 bytes that name the payload.
    """
    assert len(key) == _KEY_NBYTES, "keys of all kinds are as long"
    payload = data[ENVELOPE_NBYTES:]
    fields = _FIELDS.pack(_MAGIC, _VERSION, kind, len(payload), namespace, key, crc32c(payload))
    data[: _FIELDS.size] = fields
    data[_FIELDS.size : ENVELOPE_NBYTES] = _CRC.pack(crc32c(fields))


def unseal(data: memoryview, kind: Kind, namespace: bytes, key: bytes) -> memoryview:
    """Check a value that a server sent, and return its payload.

    Args:
        data: the value.
        kind: what was asked for.
        namespace: `Namespace.fingerprint` of the asker.
        key: what was asked for.

    Raises:
        CorruptRecordError: cut off, lengthened, damaged, or something else than what was asked for.
        UnsupportedFormatError: of a newer version.
    """
    if len(data) < ENVELOPE_NBYTES:
        raise CorruptRecordError(f"remote value: {len(data)} bytes, less than its envelope")
    fields = data[: _FIELDS.size]
    magic, version, found_kind, nbytes, found_namespace, found_key, payload_crc = _FIELDS.unpack(fields)
    if magic != _MAGIC:
        raise CorruptRecordError(f"remote value: magic is {magic!r}, not {_MAGIC!r}")
    if crc32c(fields) != _CRC.unpack_from(data, _FIELDS.size)[0]:
        raise CorruptRecordError("remote value: the envelope's checksum does not match")
    if version > _VERSION:
        raise UnsupportedFormatError(f"remote value: version {version}; this program reads up to {_VERSION}")
    if (found_kind, found_namespace, found_key) != (kind, namespace, key):
        raise CorruptRecordError("remote value: it is another one than was asked for")
    payload = data[ENVELOPE_NBYTES:]
    if len(payload) != nbytes:
        raise CorruptRecordError(f"remote value: {len(payload)} bytes, {nbytes} announced")
    if crc32c(payload) != payload_crc:
        raise CorruptRecordError("remote value: the checksum does not match")
    return payload
