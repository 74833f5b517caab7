# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md sections 6.4 to 6.6: coding 3, planes as multiples of steps, with exact exceptions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import CorruptRecordError
from tests.oracle.constants import CLASSES, MAX_CODE, RADIUS, step
from tests.oracle.elements import Bits, Dtype, from_binary32, is_finite, to_binary32
from tests.oracle.parameters import PER_ROW, WEIGHTED, Parameters, Transform
from tests.oracle.rans import STATES_NBYTES, decode, encode
from tests.oracle.segments import (
    Cut,
    Sections,
    entries_to_rows,
    rows_to_entries,
    scales_to_entries,
    section,
    segments,
)

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


class Scales(NamedTuple):
    """Axis 1: base [H] and what is stored of every coded row over it, [H, C]."""

    base: Integers
    over_base: Integers

    @property
    def codes(self) -> Integers:
        return self.base[:, None] + self.over_base


class Steps(NamedTuple):
    """What both directions need of a segment: step codes [H, T, dim]; of its channels [H, dim] all else."""

    code: Integers
    first_class: Integers
    other_class: Integers
    prediction: Floats
    mean: Floats | None

    @property
    def table(self) -> Integers:
        """Class of every element [H, T, dim]; it does not depend on scales."""
        table = np.repeat(self.other_class[:, None, :], self.code.shape[1], axis=1)
        table[:, 0] = self.first_class
        return table


def _steps(transform: Transform, parameters: Parameters, heads: slice, scales: Integers) -> Steps:
    """Of the segment with these heads, whose rows have these scales [H, T]."""
    inside = parameters.of_heads(heads)
    prediction = inside.prediction if transform.dpcm else np.zeros(inside.lsig.shape, dtype=np.float32)
    mean = inside.mean if transform.mean else None
    return Steps(inside.codes(transform, scales), *inside.classes(transform), prediction, mean)


def _reconstruct(q: Integers, steps: Steps) -> Floats:
    """Section 6.5 for a segment: [H, T, dim] quantised values to binary32."""
    x = np.zeros(q.shape, dtype=np.float32)
    r = np.zeros_like(steps.prediction)
    for t in range(q.shape[1]):
        p = steps.prediction * r if t else np.zeros_like(r)
        r = q[:, t].astype(np.float32) * step(steps.code[:, t]) + p
        x[:, t] = r if steps.mean is None else r + steps.mean
    return x


def _quantise(x: Floats, steps: Steps, low_bits: int) -> tuple[Integers, NDArray[np.bool_]]:
    """Section 6.6 for a segment: quantised values, and where they are not the nearest ones."""
    finite = np.isfinite(x)
    q = np.zeros(x.shape, dtype=np.int64)
    is_clamped = ~finite
    r = np.zeros_like(steps.prediction)
    for t in range(x.shape[1]):
        p = steps.prediction * r if t else np.zeros_like(r)
        a = x[:, t] if steps.mean is None else x[:, t] - steps.mean
        y = np.rint((a - p) * step(-steps.code[:, t]))
        most = RADIUS[steps.first_class if t == 0 else steps.other_class] << low_bits
        nearest = np.clip(y, -most, most + (1 << low_bits) - 1)
        q[:, t] = np.where(finite[:, t], nearest, 0)
        is_clamped[:, t] |= q[:, t] != y
        r = q[:, t].astype(np.float32) * step(steps.code[:, t]) + p
    return q, is_clamped


@np.errstate(all="ignore")
def encode_quantised(
    bits: Bits, dtype: Dtype, transform: Transform, parameters: Parameters, scales: Scales | None, cut: Cut
) -> bytes:
    """A plane [H, T, dim] of element bits as stored bytes.

    Args:
        bits: the elements, raw rows included.
        dtype: their type.
        transform: the fields of the directory.
        parameters: of the plane; what the transform does not use is not looked at.
        scales: for axis 1.
        cut: most tokens and heads of a segment.
    """
    coded = bits[:, transform.raw_rows :]
    heads, tokens, _ = coded.shape
    out = section(parameters.pack_in_line()) if transform.is_in_line else b""
    codes = np.zeros((heads, tokens), dtype=np.int64)
    if scales is not None:
        codes = scales.codes
        out += section(scales.base.astype("<i2").tobytes())
        if not transform.has_coded_scales:
            out += section(scales.over_base.astype(np.uint8).tobytes())
    values = to_binary32(dtype, coded)
    quantised = np.zeros(coded.shape, dtype=np.int64)
    counts, stored = [], []
    for part in segments(heads, tokens, cut):
        inside = (part.heads, part.tokens)
        steps = _steps(transform, parameters, part.heads, codes[inside])
        q, is_exception = _quantise(values[inside], steps, transform.low_bits)
        made = from_binary32(dtype, _reconstruct(q, steps))
        is_exception |= ~is_finite(dtype, made)
        quantised[inside] = q

        table = rows_to_entries(steps.table, CLASSES.null)
        symbols = rows_to_entries(q >> transform.low_bits, 0)
        if scales is not None and transform.has_coded_scales:
            of_scales = np.full_like(scales.over_base[inside], transform.scale_class)
            table = np.append(scales_to_entries(of_scales, CLASSES.null), table)
            symbols = np.append(scales_to_entries(scales.over_base[inside], 0), symbols)
        segment = encode(CLASSES, table, symbols)
        index = np.flatnonzero(is_exception.transpose(1, 0, 2))
        replaced = coded[inside].transpose(1, 0, 2).reshape(-1)[index]
        counts.append(((len(segment) - STATES_NBYTES) // 2, len(index)))
        stored.append(section(segment + index.astype("<u2").tobytes() + replaced.astype(dtype.bits).tobytes()))
    out += np.array(counts, dtype="<u4").tobytes()
    out += section(np.ascontiguousarray(bits[:, : transform.raw_rows]).tobytes())
    return out + section(_pack_low(quantised, transform.low_bits)) + b"".join(stored)


def _pack_low(q: Integers, low_bits: int) -> bytes:
    """[H, C, dim] -> bit planes [H, C, low_bits, ceil(dim / 8)]."""
    planes = (q[:, :, None, :] >> np.arange(low_bits)[:, None]) & 1
    return np.packbits(planes.astype(np.uint8), axis=-1, bitorder="little").tobytes()


def _parse_low(stored: bytes, shape: tuple[int, int, int], low_bits: int) -> Integers:
    heads, tokens, dim = shape
    packed = np.frombuffer(stored, dtype=np.uint8).reshape(heads, tokens, low_bits, -(-dim // 8))
    planes = np.unpackbits(packed, axis=-1, count=dim, bitorder="little").astype(np.int64)
    return np.asarray((planes << np.arange(low_bits)[:, None]).sum(axis=2))


def _exceptions(stored: bytes, count: int, dtype: Dtype, num_elements: int) -> tuple[Integers, Bits]:
    index = np.frombuffer(stored, "<u2", count).astype(np.int64)
    if (np.diff(index) <= 0).any() or (index >= num_elements).any():
        raise CorruptRecordError("an exception's index is out of range or out of order")
    return index, np.frombuffer(stored, dtype.bits, count, 2 * count)


@np.errstate(all="ignore")
def decode_quantised(
    plane: bytes, dtype: Dtype, shape: tuple[int, int, int], transform: Transform, known: Parameters | None, cut: Cut
) -> Bits:
    """Element bits [H, T, dim] of a stored plane.

    Args:
        plane: the stored bytes.
        dtype: of the elements.
        shape: [H, T, dim], raw rows included.
        transform: the fields of the directory.
        known: the calibration's parameters, for source 1.
        cut: most tokens and heads of a segment.

    Raises:
        CorruptRecordError: the plane violates section 4 or 6.
    """
    heads, tokens, dim = shape[0], shape[1] - transform.raw_rows, shape[2]
    sections = Sections(plane)
    parameters = known or Parameters.zeros(heads, dim)
    if transform.is_in_line:
        parameters = Parameters.parse_in_line(sections.take(parameters.in_line_nbytes(heads, dim)), heads, dim)
    if transform.source == WEIGHTED:
        parameters = parameters.weighted()
    base = over_base = np.zeros((heads, tokens), dtype=np.int64)
    if transform.axis == PER_ROW:
        base = np.frombuffer(sections.take(2 * heads), "<i2").astype(np.int64)[:, None]
        if (abs(base) > MAX_CODE).any():
            raise CorruptRecordError("the base of a head's scales is out of range")
        if not transform.has_coded_scales:
            over_base = np.frombuffer(sections.take(heads * tokens), np.uint8).reshape(heads, tokens).astype(np.int64)
    parts = segments(heads, tokens, cut)
    counts = np.frombuffer(sections.take(8 * len(parts)), "<u4").reshape(-1, 2).tolist()
    raw = sections.take(heads * transform.raw_rows * dim * dtype.nbytes)
    low = sections.take(heads * tokens * transform.low_bits * -(-dim // 8))
    low_values = _parse_low(low, (heads, tokens, dim), transform.low_bits)
    stored = [sections.take(STATES_NBYTES + 2 * words + (2 + dtype.nbytes) * extra) for words, extra in counts]
    sections.finish()

    out = np.zeros(shape, dtype=dtype.bits)
    out[:, : transform.raw_rows] = np.frombuffer(raw, dtype.bits).reshape(heads, transform.raw_rows, dim)
    for part, segment, (words, extra) in zip(parts, stored, counts, strict=True):
        inside = (part.heads, part.tokens)
        here = out[:, transform.raw_rows :][inside]
        scales = (base + over_base)[inside]
        entropy_coded = segment[: STATES_NBYTES + 2 * words]
        # Classes do not depend on the scales, so the tables are known before the scales are read.
        table = rows_to_entries(_steps(transform, parameters, part.heads, scales).table, CLASSES.null)
        num_scales = 0
        if transform.has_coded_scales:
            of_scales = scales_to_entries(np.full_like(scales, transform.scale_class), CLASSES.null)
            num_scales = len(of_scales)
            table = np.append(of_scales, table)
        symbols = decode(CLASSES, table, entropy_coded)
        if transform.has_coded_scales:
            scales = scales + symbols[: scales.size].reshape(scales.shape)
        steps = _steps(transform, parameters, part.heads, scales)
        sym = entries_to_rows(symbols[num_scales:], here.shape[0], dim)
        q = (sym << transform.low_bits) + low_values[inside]
        made = from_binary32(dtype, _reconstruct(q, steps))
        index, bits = _exceptions(segment[len(entropy_coded) :], extra, dtype, made.size)
        by_token = made.transpose(1, 0, 2).reshape(-1)
        by_token[index] = bits
        here[...] = by_token.reshape(here.shape[1], here.shape[0], dim).transpose(1, 0, 2)
    return out
