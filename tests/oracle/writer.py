# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md section 9: a block as the record that a writer of version 1.0 makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tests.oracle.basis import encode_group, quantised_group, writers_group_cut
from tests.oracle.calibration import Calibration, calibration_id
from tests.oracle.elements import Bits, Dtype, to_binary32
from tests.oracle.exponent import encode_exponent, writers_tables
from tests.oracle.measuring import measured_parameters, measured_scales
from tests.oracle.parameters import (
    CALIBRATION,
    IN_LINE,
    PER_CHANNEL,
    PER_HEAD,
    PER_ROW,
    WEIGHTED,
    Parameters,
    Transform,
)
from tests.oracle.quantised import encode_quantised
from tests.oracle.rans import GROUP
from tests.oracle.record import NO_CALIBRATION, Coding, Header, Plane, Profile, pack_record
from tests.oracle.segments import Cut, padded, writers_cut
from tests.oracle.split import encode_split

_MIN_MEASURED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """What a writer is told.

    Attributes:
        profile: of the record.
        key_mult: steps of K planes, for profiles q8 to q2.
        value_mult: steps of V planes.
        channel_values: V planes get one step per channel.
        exact_keys: K planes are never quantised.
    """

    profile: Profile
    key_mult: int = 0
    value_mult: int = 0
    channel_values: bool = False
    exact_keys: bool = False


def writers_segment_tokens(num_tokens: int, key_dim: int, value_dim: int) -> int:
    return min(num_tokens, max(1, 32768 // padded(max(key_dim, value_dim), GROUP)), 256)


def encode_record(
    planes: list[Bits],
    dtype: Dtype,
    settings: Settings,
    first_token: int = 0,
    calibration: Calibration | None = None,
) -> bytes:
    """A block, element bits [H, T, dim] of K0, V0, K1, V1, ..., as a record."""
    (heads, tokens, key_dim), value_dim = planes[0].shape, planes[1].shape[2]
    segment_tokens = writers_segment_tokens(tokens, key_dim, value_dim)
    raw_rows = min(4, tokens - 1) if first_token == 0 else 0
    groups = _encode_groups(planes, dtype, settings, raw_rows, segment_tokens, calibration)
    alone = settings
    if settings.profile is Profile.PCA and calibration and calibration.bases:
        alone = replace(settings, key_mult=max(settings.key_mult, 1), value_mult=max(settings.value_mult, -1))
    encoded = [
        groups.get(index)
        or _encode_plane(
            *(bits, dtype, alone, index % 2 == 0, raw_rows, segment_tokens),
            calibration.planes[index] if calibration else None,
        )
        for index, bits in enumerate(planes)
    ]
    is_calibrated = any(plane.is_calibrated for plane in encoded)
    identity = calibration_id(calibration.pack()) if calibration and is_calibrated else NO_CALIBRATION
    return pack_record(
        Header(
            *(segment_tokens, dtype, settings.profile, len(planes) // 2, heads, key_dim, value_dim, tokens),
            *(first_token, identity),
        ),
        encoded,
    )


def _encode_groups(
    planes: list[Bits],
    dtype: Dtype,
    settings: Settings,
    raw_rows: int,
    segment_tokens: int,
    calibration: Calibration | None,
) -> dict[int, Plane]:
    """Planes of coding 4 by their place: those that hold bytes, and those that follow."""
    found: dict[int, Plane] = {}
    if settings.profile is not Profile.PCA or calibration is None or calibration.bases is None:
        return found
    for index, bits in enumerate(planes):
        basis, is_key = calibration.bases.of_plane(index), index % 2 == 0
        if basis is None or (is_key and settings.exact_keys):
            continue
        members = range(index, index + 2 * calibration.bases.layers_of(index, len(planes) // 2), 2)
        mult = settings.key_mult if is_key else settings.value_mult
        group = np.concatenate([planes[member] for member in members]).astype(dtype.bits)
        known = [calibration.planes[member] for member in members]
        symbols, exact = quantised_group(group, dtype, basis, known, mult, raw_rows)
        cut = writers_group_cut(basis.runs, bits.shape[1], segment_tokens)
        stored = encode_group(group, basis, mult, symbols, exact, cut)
        if len(stored) < group.nbytes:
            found |= dict.fromkeys(members, Plane(Coding.BASIS, b""))
            found[index] = Plane(Coding.BASIS, stored, None, cut.heads, mult)
    return found


def _encode_plane(
    bits: Bits,
    dtype: Dtype,
    settings: Settings,
    is_key: bool,
    raw_rows: int,
    segment_tokens: int,
    known: Parameters | None,
) -> Plane:
    """The first of the codings that the profile tries which is smaller than raw, else raw."""
    heads, tokens, dim = bits.shape
    tried = []
    match settings.profile:
        case Profile.RAW:
            pass
        case Profile.ZSTD:
            tried.append(Plane(Coding.SPLIT, encode_split(bits)))
        case _:
            if settings.profile is not Profile.LOSSLESS and not (is_key and settings.exact_keys):
                tried += _quantised(bits, dtype, settings, is_key, raw_rows, segment_tokens, known)
            cut = writers_cut(heads, tokens, dim, segment_tokens)
            tables = writers_tables(dtype, bits, is_key=is_key)
            tried.append(Plane(Coding.EXPONENT, encode_exponent(bits, tables, cut), None, cut.heads))
    raw = Plane(Coding.RAW, bits.astype(dtype.bits).tobytes())
    return next((plane for plane in tried if len(plane.stored) < len(raw.stored)), raw)


def _quantised(
    bits: Bits,
    dtype: Dtype,
    settings: Settings,
    is_key: bool,
    raw_rows: int,
    segment_tokens: int,
    known: Parameters | None,
) -> list[Plane]:
    """The plane as quantised, or nothing where too few tokens would measure its channels."""
    heads, tokens, dim = bits.shape
    values = to_binary32(dtype, bits[:, raw_rows:])
    mult = settings.key_mult if is_key else settings.value_mult
    low_bits = min(max((mult - 16) >> 3, 0), 3)
    axis = PER_HEAD if is_key else PER_CHANNEL if settings.channel_values else PER_ROW
    scales, scale_class = measured_scales(values, mult) if axis == PER_ROW else (None, 0)
    if known is not None:
        source, parameters = CALIBRATION, known
    elif axis == PER_ROW:
        source, parameters = 0, Parameters.zeros(heads, dim)
    elif tokens - raw_rows >= _MIN_MEASURED_TOKENS:
        source, parameters = IN_LINE, measured_parameters(values)
        if is_key:
            source, parameters = WEIGHTED, parameters.weighted()
    else:
        return []
    has_mean = axis != PER_ROW
    has_dpcm = axis == PER_HEAD and source == CALIBRATION
    transform = Transform(axis, has_mean, has_dpcm, source, mult, low_bits, raw_rows, scale_class)
    cut: Cut = writers_cut(heads, tokens - raw_rows, dim, segment_tokens)
    stored = encode_quantised(bits, dtype, transform, parameters, scales, cut)
    return [Plane(Coding.QUANTISED, stored, transform, cut.heads)]
