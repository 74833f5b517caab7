# SPDX-License-Identifier: Apache-2.0
"""Records that no version 1.0 writer makes and every reader must accept: any cut, transform, tables and scales."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.oracle.basis import encode_group, group_fits, quantised_group
from tests.oracle.blocks import Geometry, random_parameters, random_plane
from tests.oracle.calibration import Calibration, calibration_id
from tests.oracle.constants import MAX_CODE, RADIUS
from tests.oracle.elements import Bits, Dtype, to_binary32
from tests.oracle.exponent import ExponentTables, encode_exponent, frequencies, top_bytes
from tests.oracle.measuring import measured_scales
from tests.oracle.parameters import CALIBRATION, IN_LINE, NONE, PER_HEAD, PER_ROW, WEIGHTED, Parameters, Transform
from tests.oracle.quantised import Scales, encode_quantised
from tests.oracle.random_bases import with_random_bases
from tests.oracle.record import NO_CALIBRATION, Coding, Header, Plane, Profile, allowed, pack_record
from tests.oracle.segments import Cut, fits
from tests.oracle.split import encode_split


def _free_cut(rng: np.random.Generator, heads: int, coded_tokens: int, dim: int, segment_tokens: int) -> Cut:
    """Any number of heads that the bound allows; the header fixes the tokens."""
    possible = [h for h in range(1, heads + 1) if fits(coded_tokens, dim, Cut(segment_tokens, h))]
    return Cut(segment_tokens, int(rng.choice(possible)))


def _free_exponent(rng: np.random.Generator, bits: Bits, segment_tokens: int) -> Plane:
    heads, tokens, dim = bits.shape
    num_tables = int(rng.integers(1, 17))
    table = rng.integers(0, num_tables, (heads, dim))
    symbols = top_bytes(bits)
    of_element = np.broadcast_to(table[:, None, :], symbols.shape)
    rows = []
    for k in range(num_tables):
        count = np.bincount(symbols[of_element == k], minlength=256)
        rows.append(frequencies(count + rng.integers(0, 2, 256) * rng.integers(0, 2)))
    cut = _free_cut(rng, heads, tokens, dim, segment_tokens)
    return Plane(Coding.EXPONENT, encode_exponent(bits, ExponentTables(table, np.stack(rows)), cut), None, cut.heads)


def _free_transform(rng: np.random.Generator, tokens: int, *, may_calibrate: bool) -> Transform:
    source = int(rng.choice([NONE, CALIBRATION, IN_LINE, WEIGHTED] if may_calibrate else [NONE, IN_LINE, WEIGHTED]))
    has_parameters = source != NONE
    return Transform(
        axis=PER_HEAD if source == WEIGHTED else int(rng.integers(3)) if has_parameters else PER_ROW,
        mean=has_parameters and bool(rng.integers(2)),
        dpcm=source == CALIBRATION and bool(rng.integers(2)),
        source=source,
        mult=int(rng.choice([rng.integers(-8, 33), rng.integers(-128, 128)], p=[0.9, 0.1])),
        low_bits=int(rng.integers(4)),
        raw_rows=int(rng.integers(min(5, tokens))),
    )


def _free_scales(rng: np.random.Generator, coded: Bits, dtype: Dtype, mult: int) -> tuple[Scales, int]:
    """The writer's scales, or those of a class that is wider, or bytes, with a base that is not in the middle."""
    scales, scale_class = measured_scales(to_binary32(dtype, coded), mult)
    if scale_class == 255 or rng.integers(3) == 0:
        codes = np.clip(scales.codes, -MAX_CODE, MAX_CODE)
        base = np.clip(codes.min(axis=1) - rng.integers(0, 9, len(codes)), -MAX_CODE, MAX_CODE)
        return Scales(base, np.clip(codes - base[:, None], 0, 255)), 255
    scale_class = int(rng.integers(scale_class, 16))
    most = int(RADIUS[scale_class])
    return Scales(scales.base, np.clip(scales.over_base + rng.integers(-1, 2), -most, most)), scale_class


def _free_quantised(
    rng: np.random.Generator, bits: Bits, dtype: Dtype, segment_tokens: int, known: Parameters | None
) -> Plane:
    heads, tokens, dim = bits.shape
    transform = _free_transform(rng, tokens, may_calibrate=known is not None)
    match transform.source:
        case 0:
            parameters = Parameters.zeros(heads, dim)
        case 1:
            assert known is not None
            parameters = known
        case _:
            zeros = np.zeros((heads, dim), dtype=np.int64)
            parameters = replace(random_parameters(rng, bits, dtype), lres=zeros, rho=zeros, lstep=zeros)
            if transform.source == WEIGHTED:
                parameters = parameters.weighted()
    scales = None
    coded = bits[:, transform.raw_rows :]
    if transform.axis == PER_ROW:
        scales, scale_class = _free_scales(rng, coded, dtype, transform.mult)
        transform = replace(transform, scale_class=scale_class)
    cut = _free_cut(rng, heads, coded.shape[1], dim, segment_tokens)
    stored = encode_quantised(bits, dtype, transform, parameters, scales, cut)
    return Plane(Coding.QUANTISED, stored, transform, cut.heads)


def _free_groups(
    rng: np.random.Generator,
    planes: list[Bits],
    dtype: Dtype,
    segment_tokens: int,
    calibration: Calibration,
) -> dict[int, Plane]:
    """Some groups of coding 4, their last layers left out at times, with exact tokens and symbols as they come."""
    found: dict[int, Plane] = {}
    assert calibration.bases is not None
    tokens = planes[0].shape[1]
    for index in range(len(planes)):
        basis = calibration.bases.of_plane(index)
        most = calibration.bases.layers_of(index, len(planes) // 2)
        possible = [
            runs for runs in range(1, basis.runs + 1 if basis else 1) if group_fits(runs, tokens, segment_tokens)
        ]
        if basis is None or not possible or rng.integers(3) == 0:
            continue
        members = range(index, index + 2 * most, 2)
        group = np.concatenate([planes[member] for member in members]).astype(dtype.bits)
        mult = int(rng.choice([rng.integers(-16, 17), rng.integers(-128, 128)], p=[0.9, 0.1]))
        known = [calibration.planes[member] for member in members]
        symbols, exact = quantised_group(group, dtype, basis, known, mult, 0)
        is_entry = (np.arange(basis.runs * 64) < basis.rank + len(basis.base)).reshape(-1, 1, 64)
        far = rng.random(symbols.shape) < rng.choice([0, 0.001, 0.05])
        symbols = np.where(far & is_entry, rng.integers(-32768, 32768, symbols.shape), symbols)
        exact = np.where(rng.random(tokens) < 0.1, rng.random(tokens) < 0.5, exact & (rng.random(tokens) < 0.2))
        cut = Cut(segment_tokens, int(rng.choice(possible)))
        stored = encode_group(group, basis, mult, symbols, exact, cut)
        kept = members[: int(rng.integers(1, most + 1))]
        if len(stored) < len(kept) * planes[index].nbytes:
            found |= dict.fromkeys(kept, Plane(Coding.BASIS, b""))
            found[index] = Plane(Coding.BASIS, stored, None, cut.heads, mult)
    return found


def free_record(
    rng: np.random.Generator, geometry: Geometry, dtype: Dtype, profile: Profile, flavour: str
) -> tuple[bytes, Calibration]:
    """A record, and the calibration that its planes may refer to.

    Args:
        rng: where all choices come from.
        geometry: of the block; a plane of one head and one token has to fit a segment.
        dtype: of the elements.
        profile: which codings may occur.
        flavour: of the elements, see `random_plane`.
    """
    planes = [random_plane(rng, geometry.shape(i), dtype, flavour) for i in range(2 * geometry.num_layers)]
    calibration = Calibration(tuple(random_parameters(rng, plane, dtype) for plane in planes))
    most = max(geometry.key_dim, geometry.value_dim)
    segment_tokens = int(rng.integers(1, 65536))
    while not fits(geometry.num_tokens, most, Cut(segment_tokens, 1)):
        segment_tokens = 1 + segment_tokens // 2
    if rng.integers(2):
        segment_tokens = int(rng.integers(1, min(segment_tokens, geometry.num_tokens) + 1))
    groups: dict[int, Plane] = {}
    if profile is Profile.PCA:
        calibration = with_random_bases(rng, planes, calibration, dtype)
        groups = _free_groups(rng, planes, dtype, segment_tokens, calibration)
    stored = []
    for index, bits in enumerate(planes):
        if index in groups:
            stored.append(groups[index])
            continue
        match Coding(int(rng.choice(allowed(profile)))):
            case Coding.SPLIT:
                plane = Plane(Coding.SPLIT, encode_split(bits))
            case Coding.EXPONENT:
                plane = _free_exponent(rng, bits, segment_tokens)
            case Coding.QUANTISED:
                plane = _free_quantised(rng, bits, dtype, segment_tokens, calibration.planes[index])
            case _:
                plane = Plane(Coding.RAW, bits.tobytes())
        stored.append(plane if len(plane.stored) < bits.nbytes else Plane(Coding.RAW, bits.tobytes()))
    is_calibrated = any(plane.is_calibrated for plane in stored)
    header = Header(
        *(segment_tokens, dtype, profile, geometry.num_layers, geometry.kv_heads, geometry.key_dim),
        *(geometry.value_dim, geometry.num_tokens, int(rng.integers(1 << 63))),
        *(calibration_id(calibration.pack()) if is_calibrated else NO_CALIBRATION, int(rng.integers(1 << 16)) << 16),
        int(rng.integers(256)),
    )
    return pack_record(header, stored), calibration
