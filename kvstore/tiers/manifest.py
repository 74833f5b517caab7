# SPDX-License-Identifier: Apache-2.0
"""What describes a stream: its immutable header, its manifest, and their JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TypeAlias

from kvstore.codec import Profile
from kvstore.errors import ConfigError, CorruptRecordError, KVStoreError, SpecMismatchError
from kvstore.layout import BlockLayout
from kvstore.spec import ModelSpec
from kvstore.tiers.tables.records import Entry

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"

MAX_NAME_NBYTES = 400
"""LMDB keys end at 511 bytes."""

HEADER_VERSION = 1


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """Everything about a stream that is fixed when it is created.

    Args:
        name: unique in the store; 1 to 400 bytes of UTF-8.
        spec: the model whose KV it holds.
        block_tokens: tokens that a slot has room for.
        profile: how its blocks are coded.
        prefill: names the way the KV was computed (window, sinks): KV computed otherwise is other KV.
        source: facts about the input, e.g. file name, duration, frames per second; JSON values.
        created_unix_s: seconds since 1970.

    Raises:
        ConfigError: the name is empty or too long, `source` is not JSON, or a number is out of range.
    """

    name: str
    spec: ModelSpec
    block_tokens: int
    profile: Profile
    prefill: str
    source: dict[str, JSON]
    created_unix_s: float

    def __post_init__(self) -> None:
        check_name(self.name)
        BlockLayout(self.spec, self.block_tokens)
        if not math.isfinite(self.created_unix_s):
            raise ConfigError(f"created_unix_s is {self.created_unix_s}")
        dump_json(self.source, "StreamHeader.source")

    @property
    def layout(self) -> BlockLayout:
        """Layout of the stream's slots."""
        return BlockLayout(self.spec, self.block_tokens)

    @property
    def namespace(self) -> str:
        """What decides the bytes of its blocks beside their tokens: a part of every block's key."""
        return f"{self.spec.fingerprint};{self.profile};{self.prefill}"

    def describes_same(self, other: StreamHeader) -> bool:
        """True when both describe one stream: all but the time of creation is equal."""
        return replace(self, created_unix_s=0.0) == replace(other, created_unix_s=0.0)

    def to_json(self) -> bytes:
        """Encode for the catalogue."""
        fields = {**asdict(self), "version": HEADER_VERSION}
        return dump_json(fields, "StreamHeader")

    @staticmethod
    def from_json(name: str, data: bytes) -> StreamHeader:
        """Inverse of `to_json`.

        Raises:
            CorruptRecordError: not a header of a stream called `name`.
        """
        fields = load_json(data, f"header of stream {name!r}")
        try:
            if fields.pop("version") != HEADER_VERSION or fields["name"] != name:
                raise CorruptRecordError(f"header of stream {name!r}: wrong version or name")
            spec = ModelSpec(**fields.pop("spec"))  # type: ignore[arg-type]
            profile = Profile(str(fields.pop("profile")))
            return StreamHeader(spec=spec, profile=profile, **fields)  # type: ignore[arg-type]
        except CorruptRecordError:
            raise
        except (KVStoreError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptRecordError(f"header of stream {name!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class Manifest:
    """A snapshot of one stream: what was durable when it was taken.

    Args:
        header: the fixed part.
        entries: its blocks in order.
        cursor: where the producer stands, as given to the last durable append; `is_complete` tells a finished stream.
        num_tokens: tokens of all entries.
        lineage: the stream's number in the store, and how often it was cut: of two snapshots with the same one, the
            shorter is the beginning of the longer.
        is_whole: whether `entries` are all; else the first ones.
    """

    header: StreamHeader
    entries: Sequence[Entry]
    cursor: dict[str, JSON]
    num_tokens: int
    lineage: tuple[int, int] = field(default=(0, 0), compare=False)
    is_whole: bool = True

    @property
    def is_complete(self) -> bool:
        """True when the producer has said that nothing more will come: its cursor holds `is_complete: true`."""
        return self.cursor.get("is_complete") is True


def check_spec(header: StreamHeader, spec: ModelSpec) -> None:
    """Refuse a stream that another model wrote.

    Raises:
        SpecMismatchError: names the fields that differ.
    """
    if header.spec.fingerprint == spec.fingerprint:
        return
    stored, wanted = asdict(header.spec), asdict(spec)
    differing = [f"{name} {stored[name]!r} != {wanted[name]!r}" for name in stored if stored[name] != wanted[name]]
    raise SpecMismatchError(f"stream {header.name!r} was written by another model: {', '.join(differing)}")


def check_name(name: str) -> bytes:
    """Return a stream's name as a catalogue key; raises `ConfigError` unless it is 1 to 400 bytes of UTF-8."""
    try:
        key = name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"stream name {name!r} is not valid Unicode") from error
    if not 1 <= len(key) <= MAX_NAME_NBYTES:
        raise ConfigError(f"stream name {name[:40]!r}: {len(key)} bytes; use 1 to {MAX_NAME_NBYTES}")
    return key


def dump_json(value: object, what: str) -> bytes:
    """Encode as compact UTF-8 JSON; raises `ConfigError` for what JSON cannot hold (NaN included)."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not JSON: {error}") from error


def load_json(data: bytes, what: str) -> dict[str, JSON]:
    """Decode a JSON object read from disk; raises `CorruptRecordError` for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptRecordError(f"{what}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptRecordError(f"{what}: not a JSON object")
    return value
