# SPDX-License-Identifier: Apache-2.0
"""Header and directory of a record as values, and how they are read; FORMAT.md sections 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, NamedTuple

from kvstore.errors import ConfigError, ShapeError
from kvstore.native import probe_record

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvstore.native import PlaneDirectory

DTYPES = ("bfloat16", "float16", "float32")
"""Element types by their number in the format."""

_HEADER_NBYTES = 64
_ENTRY_NBYTES = 16
_PLANE_ALIGNMENT = 16


class Profile(StrEnum):
    """What a record promises: `raw`, `zstd` and `lossless` are bit-exact; `q8` to `q2` are ever coarser.

    `pca` codes several layers together, in a basis that a calibration holds (KVTC, arXiv 2511.01815); with one that
    holds none it stores what `q2` does.
    """

    RAW = "raw"
    ZSTD = "zstd"
    LOSSLESS = "lossless"
    Q8 = "q8"
    Q4 = "q4"
    Q3 = "q3"
    Q2 = "q2"
    PCA = "pca"

    @property
    def is_lossy(self) -> bool:
        """True when decoding gives back other bits than were encoded."""
        return self not in (Profile.RAW, Profile.ZSTD, Profile.LOSSLESS)


PROFILES = tuple(Profile)
"""Profiles by their number in the format."""


@dataclass(frozen=True, slots=True)
class Steps:
    """How coarsely a lossy profile quantises: a step is 2^(-mult / 8) times an rms (FORMAT.md section 6.3).

    Args:
        key_mult: for K, of the rms of a head; -128 to 127.
        value_mult: for V, of the rms of a token's row; -128 to 127.
        has_channel_values: one step per channel of V instead of one per token, as video models want it (VidKV,
            arXiv 2503.16257).
    """

    key_mult: int
    value_mult: int
    has_channel_values: bool = False

    def __post_init__(self) -> None:
        if not (-128 <= self.key_mult <= 127 and -128 <= self.value_mult <= 127):
            raise ConfigError(f"mult is {self.key_mult} for K and {self.value_mult} for V; it must be -128 to 127")


STEPS = {
    Profile.Q8: Steps(24, 24),
    Profile.Q4: Steps(14, 11),
    Profile.Q3: Steps(6, 3),
    Profile.Q2: Steps(1, -1),
    Profile.PCA: Steps(-5, -3),
}
"""Steps of the lossy profiles with a calibration, chosen so that a KL divergence of 0.0002, 0.002, 0.008 and 0.021 is
kept without knowing how the model minds errors; where that is known, coarser ones are decided (kvstore/decision.py)."""

UNCALIBRATED_STEPS = {
    Profile.Q8: Steps(24, 24),
    Profile.Q4: Steps(16, 12),
    Profile.Q3: Steps(8, 3),
    Profile.Q2: Steps(3, -1),
}
"""Finer ones for about the same divergence: blocks that measure themselves predict no token from the one before, and
know deviations by few of them (docs/codec-quality.md)."""


def effective(profile: Profile, has_bases: bool) -> Profile:
    """What blocks of a profile are coded as: without bases `pca` is `q2`."""
    return Profile.Q2 if profile is Profile.PCA and not has_bases else profile


def usual_steps(profile: Profile, has_bases: bool | None) -> Steps:
    """Those of a profile where nobody says others.

    Args:
        profile: any; those without steps have zeros.
        has_bases: of the calibration; None when there is none.
    """
    steps = UNCALIBRATED_STEPS if has_bases is None else STEPS
    return steps.get(effective(profile, bool(has_bases)), Steps(0, 0))


class Coding(IntEnum):
    """How one plane is stored (FORMAT.md section 3)."""

    RAW = 0
    SPLIT = 1
    EXPONENT = 2
    QUANTISED = 3
    BASIS = 4


class PlaneInfo(NamedTuple):
    """One directory entry: where K or V of one layer lies in the record, and how it is stored (FORMAT.md section 2)."""

    offset: int
    nbytes: int
    raw_nbytes: int
    coding: Coding
    crc32c: int
    transform: int
    mult: int
    low_bits: int
    raw_rows: int
    scale_class: int
    segment_heads: int

    @property
    def is_follower(self) -> bool:
        """True when an earlier layer's plane of the same side holds this one's bytes too."""
        return self.coding is Coding.BASIS and self.nbytes == 0


@dataclass(frozen=True, slots=True)
class RecordInfo:
    """Header and directory of a record."""

    version: tuple[int, int]
    profile: Profile
    num_layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    num_tokens: int
    segment_tokens: int
    first_token: int
    calibration_id: bytes
    header_nbytes: int
    total_nbytes: int
    directory: PlaneDirectory = field(compare=False, repr=False)

    @property
    def planes(self) -> tuple[PlaneInfo, ...]:
        """The directory's entries, made anew at every call, in the order K0, V0, K1, V1, ..."""
        return tuple(PlaneInfo(*entry[:3], Coding(entry[3]), *entry[4:]) for entry in self.directory.entries())


def header_nbytes(num_layers: int) -> int:
    """Bytes of header and directory: as much of a record as `Codec.probe` needs."""
    return _HEADER_NBYTES + 2 * num_layers * _ENTRY_NBYTES


def plane_span(info: RecordInfo, layers: range) -> tuple[int, int]:
    """Find the bytes of a record that hold a run of layers.

    Args:
        info: the record's header.
        layers: consecutive layers, at least one.

    Returns:
        offset and nbytes; they cover the checksummed padding too, as `Codec.decode_planes` needs it, and the earlier
        layers that hold bytes of these.

    Raises:
        ShapeError: `layers` is empty, has gaps, or goes beyond the record's layers.
    """
    return info.directory.span(*layer_bounds(layers))


def probe(record: Buffer) -> RecordInfo:
    """Read and validate a record's header and directory; no plane is looked at.

    Args:
        record: the record, or at least its first `header_nbytes(num_layers)` bytes.

    Raises:
        CorruptRecordError: cut off, damaged, or violating the format.
        UnsupportedFormatError: a newer major version, or a required feature that this version does not know.
    """
    found = probe_record(record)
    version, profile, layers, heads, key_dim, value_dim, dtype, tokens, cut, first, calibration, *_ = found
    header, total, directory = found[-3:]
    return RecordInfo(
        version=version,
        profile=PROFILES[profile],
        num_layers=layers,
        kv_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=DTYPES[dtype],
        num_tokens=tokens,
        segment_tokens=cut,
        first_token=first,
        calibration_id=calibration,
        header_nbytes=header,
        total_nbytes=total,
        directory=directory,
    )


def layer_bounds(layers: range) -> tuple[int, int]:
    """First layer and the one behind the last.

    Raises:
        ShapeError: `layers` has gaps, or numbers below zero.
    """
    if layers.step != 1 or min(layers.start, layers.stop) < 0:
        raise ShapeError(f"layers {layers}: they must be consecutive, at least one")
    return layers.start, layers.stop
