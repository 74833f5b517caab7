# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md sections 8.1 and 11: one side of a group of layers as sums of calibrated components."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import CorruptRecordError
from tests.oracle.constants import CLASSES, RADIUS, clamp_code, log16, step, sum16
from tests.oracle.elements import Bits, Dtype, from_binary32, is_finite, to_binary32
from tests.oracle.parameters import MAX_LRMS, Parameters
from tests.oracle.rans import GROUP, STATES_NBYTES, decode, encode
from tests.oracle.segments import Cut, Sections, entries_to_rows, rows_to_entries, section, segments

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]
_TOO_LARGE = 0x4000
_MAX_SYMBOL = 32767
_MAX_SQUARE = np.float32(0.125)
_MAX_SEGMENT = 65536


@dataclass(frozen=True, slots=True)
class Basis:
    """One side of one group: lsig [rank]; base and ssig [S], empty for K; component [S, rank, dim], bfloat16."""

    lsig: Integers
    base: Integers
    ssig: Integers
    component: NDArray[np.uint16]

    @property
    def rank(self) -> int:
        return len(self.lsig)

    @property
    def runs(self) -> int:
        return -(-(self.rank + len(self.base)) // GROUP)

    def pack(self) -> bytes:
        out = struct.pack("<HH", self.rank, 0)
        if self.rank:
            for array in (self.lsig, self.base, self.ssig):
                out += array.astype("<i2").tobytes()
            out += self.component.astype("<u2").tobytes()
        return section(out)

    def classes(self, mult: int) -> Integers:
        """[runs, 64]; null from the last entry on."""
        levels = np.concatenate([self.lsig + 4 * mult, self.ssig])
        out = np.full(self.runs * GROUP, CLASSES.null, dtype=np.int64)
        out[: len(levels)] = np.clip(((levels + 8) >> 4) + 6, 0, 15)
        return out.reshape(self.runs, GROUP)

    def codes(self, planes: list[Parameters], mult: int, scales: Integers) -> Integers:
        """Step codes [S, T, dim], given scale symbols [S, T]."""
        lstep = np.concatenate([plane.lstep for plane in planes])
        if len(self.base):
            rows = self.base[:, None] + 4 * scales
        else:
            rows = np.broadcast_to(np.concatenate([plane.lrms for plane in planes])[:, None], scales.shape)
        return clamp_code(rows[:, :, None] - mult + lstep[:, None, :])

    def mean(self, planes: list[Parameters]) -> Floats | None:
        """[S, 1, dim]; None for V."""
        return None if len(self.base) else np.concatenate([plane.mean for plane in planes])[:, None]


@dataclass(frozen=True, slots=True)
class Bases:
    """What follows a calibration's planes: `groups` K0, V0, K1, V1, ... of groups."""

    group_layers: int
    groups: tuple[Basis, ...]

    def pack(self) -> bytes:
        return struct.pack("<HH", self.group_layers, 0) + b"".join(basis.pack() for basis in self.groups)

    def of_plane(self, plane: int) -> Basis | None:
        """Of the group whose first layer is that of `plane`; None if it is in the middle of one, or has no basis."""
        number, rest = divmod(plane // 2, self.group_layers)
        basis = self.groups[2 * number + plane % 2]
        return None if rest or not basis.rank else basis

    def layers_of(self, plane: int, num_layers: int) -> int:
        """Layers of the group that `plane` begins."""
        return min(self.group_layers, num_layers - plane // 2)


def parse_bases(stored: bytes, layers: int, heads: int, dims: list[int]) -> Bases:
    """Raises CorruptRecordError when they violate section 8.1."""
    sections = Sections(stored)
    group_layers, reserved = struct.unpack("<HH", sections.take(4))
    if reserved or not 1 <= group_layers <= layers:
        raise CorruptRecordError("group_layers is out of range")
    groups = []
    for first in range(0, layers, group_layers):
        rows = min(group_layers, layers - first) * heads
        groups += [_parse_basis(sections, rows, dim, has_scales=side == 1) for side, dim in enumerate(dims)]
    sections.finish()
    return Bases(group_layers, tuple(groups))


def _parse_basis(sections: Sections, rows: int, dim: int, *, has_scales: bool) -> Basis:
    rank, reserved = struct.unpack("<HH", sections.peek(4))
    if reserved or rank > rows * dim:
        raise CorruptRecordError("the rank of a basis is out of range")
    scales = rows if has_scales and rank else 0
    small = rank + 2 * scales
    stored = sections.take(4 + 2 * small + 2 * rows * rank * dim)
    levels = np.frombuffer(stored, "<i2", small, 4).astype(np.int64)
    component = np.frombuffer(stored, "<u2", rows * rank * dim, 4 + 2 * small).reshape(rows, rank, dim)
    basis = Basis(levels[:rank], levels[rank : rank + scales], levels[rank + scales :], component)
    if ((component & 0x7FFF) >= _TOO_LARGE).any() or (abs(basis.base) > MAX_LRMS).any():
        raise CorruptRecordError("a component or a base is out of range")
    return basis


def writers_group_cut(runs: int, tokens: int, segment_tokens: int) -> Cut:
    """segment_heads as section 11.4 chooses it."""
    most = max(1, _MAX_SEGMENT // (GROUP * min(segment_tokens, tokens)))
    groups = -(-runs // most)
    return Cut(segment_tokens, -(-runs // groups))


def _rebuilt(q: Integers, basis: Basis, codes: Integers, mean: Floats | None) -> Floats:
    """x of section 11.4, [S, T, dim], from symbols [T, rank]."""
    component = to_binary32(Dtype.BFLOAT16, basis.component)
    z = np.zeros((component.shape[0], len(q), component.shape[2]), dtype=np.float32)
    for k in range(basis.rank):
        z = z + q[None, :, k, None].astype(np.float32) * component[:, None, k]
    x: Floats = z * step(codes)
    return x if mean is None else x + mean


@np.errstate(all="ignore")
def quantised_group(
    bits: Bits, dtype: Dtype, basis: Basis, planes: list[Parameters], mult: int, raw_rows: int
) -> tuple[Integers, NDArray[np.bool_]]:
    """Symbols [runs, T, 64] and which tokens are exact [T].

    Args:
        bits: [S, T, dim] elements of all layers.
        dtype: of the elements.
        basis: of the group and side.
        planes: what the calibration says of each layer.
        mult: of the directory.
        raw_rows: leading tokens that are exact anyway.
    """
    rows, tokens, dim = bits.shape
    values = to_binary32(dtype, bits)
    finite = np.isfinite(values)
    exact: NDArray[np.bool_] = np.asarray(~finite.all(axis=(0, 2)))
    exact[:raw_rows] = True
    scales = np.zeros((rows, tokens), dtype=np.int64)
    if len(basis.base):
        x = np.where(finite, values, np.float32(0))
        of_row, is_zero = log16(sum16(x * x) * (np.float32(1) / np.float32(dim)))
        over = ((of_row + 2) >> 2) - basis.base[:, None]
        scales = np.where(is_zero, 0, (over + 2) >> 2)
    codes, mean = basis.codes(planes, mult, scales), basis.mean(planes)
    a = (values if mean is None else values - mean) * step(-codes)
    component = to_binary32(Dtype.BFLOAT16, basis.component)
    y = np.zeros((tokens, basis.rank), dtype=np.float32)
    for row in range(rows):
        for c in range(dim):
            y = y + a[row, :, c, None] * component[row, None, :, c]
    exact |= ~(abs(y) <= _MAX_SYMBOL).all(axis=1)
    q = np.where(exact[:, None], 0, np.rint(y)).astype(np.int64)
    x = _rebuilt(q, basis, codes, mean)
    exact |= ~is_finite(dtype, from_binary32(dtype, x)).all(axis=(0, 2))
    d = (values - x) * step(-codes)
    e = np.zeros(tokens, dtype=np.float32)
    for row in range(rows):
        e = e + sum16(d[row] * d[row])
    exact |= ~(e <= _MAX_SQUARE * np.float32(rows * dim))

    entries = np.concatenate([q, scales[: len(basis.base)].T], axis=1)
    symbols = np.zeros((tokens, basis.runs * GROUP), dtype=np.int64)
    symbols[:, : entries.shape[1]] = np.where(exact[:, None], 0, entries)
    return symbols.reshape(tokens, basis.runs, GROUP).transpose(1, 0, 2), exact


def encode_group(bits: Bits, basis: Basis, mult: int, symbols: Integers, exact: NDArray[np.bool_], cut: Cut) -> bytes:
    """The bytes of a group [S, T, dim], from any symbols [runs, T, 64] and any choice of exact tokens."""
    which = np.flatnonzero(exact)
    out = struct.pack("<HH", len(which), 0) + section(which.astype("<u2").tobytes())
    classes = basis.classes(mult)
    radius = np.append(RADIUS, 0)[classes][:, None]
    counts, stored = [], []
    for part in segments(basis.runs, bits.shape[1], cut):
        inside = symbols[part.heads, part.tokens]
        coded = np.clip(inside, -radius[part.heads], radius[part.heads])
        table = np.repeat(classes[part.heads, None], inside.shape[1], axis=1)
        segment = encode(CLASSES, rows_to_entries(table, CLASSES.null), rows_to_entries(coded, 0))
        by_token = inside.transpose(1, 0, 2).reshape(-1)
        index = np.flatnonzero(by_token != coded.transpose(1, 0, 2).reshape(-1))
        counts.append(((len(segment) - STATES_NBYTES) // 2, len(index)))
        stored.append(section(segment + index.astype("<u2").tobytes() + by_token[index].astype("<i2").tobytes()))
    out += np.array(counts, dtype="<u4").tobytes()
    return out + section(bits[:, which].tobytes()) + b"".join(stored)


@np.errstate(all="ignore")
def decode_group(
    stored: bytes,
    dtype: Dtype,
    shape: tuple[int, int, int],
    basis: Basis,
    planes: list[Parameters],
    mult: int,
    cut: Cut,
) -> Bits:
    """Element bits [S, T, dim].

    Raises:
        CorruptRecordError: the bytes violate section 4 or 11.
    """
    rows, tokens, dim = shape
    sections = Sections(stored)
    (count,) = struct.unpack_from("<H", sections.take(4))
    which = np.frombuffer(sections.take(2 * count), "<u2").astype(np.int64)
    if (np.diff(which) <= 0).any() or (which >= tokens).any():
        raise CorruptRecordError("exact tokens out of range or out of order")
    parts = segments(basis.runs, tokens, cut)
    counts = np.frombuffer(sections.take(8 * len(parts)), "<u4").reshape(-1, 2).tolist()
    exact = np.frombuffer(sections.take(rows * count * dim * dtype.nbytes), dtype.bits).reshape(rows, count, dim)
    each = [sections.take(STATES_NBYTES + 2 * words + 4 * extra) for words, extra in counts]
    sections.finish()

    classes = basis.classes(mult)
    symbols = np.zeros((basis.runs, tokens, GROUP), dtype=np.int64)
    for part, segment, (words, extra) in zip(parts, each, counts, strict=True):
        here = symbols[part.heads, part.tokens]
        table = np.repeat(classes[part.heads, None], here.shape[1], axis=1)
        end = STATES_NBYTES + 2 * words
        found = decode(CLASSES, rows_to_entries(table, CLASSES.null), segment[:end])
        by_token = entries_to_rows(found, here.shape[0], GROUP).transpose(1, 0, 2).reshape(-1).copy()
        index = np.frombuffer(segment, "<u2", extra, end).astype(np.int64)
        is_null = table.transpose(1, 0, 2).reshape(-1) == CLASSES.null
        if (np.diff(index) <= 0).any() or (index >= by_token.size).any() or is_null[index].any():
            raise CorruptRecordError("an exception's index is out of range or out of order")
        by_token[index] = np.frombuffer(segment, "<i2", extra, end + 2 * extra)
        here[...] = by_token.reshape(here.shape[1], here.shape[0], GROUP).transpose(1, 0, 2)
    entries = symbols.transpose(1, 0, 2).reshape(tokens, -1)
    scales = np.zeros((rows, tokens), dtype=np.int64)
    if len(basis.base):
        scales = entries[:, basis.rank : basis.rank + rows].T
    x = _rebuilt(entries[:, : basis.rank], basis, basis.codes(planes, mult, scales), basis.mean(planes))
    out = from_binary32(dtype, x)
    out[:, which] = exact
    return out


def group_fits(segment_heads: int, tokens: int, segment_tokens: int) -> bool:
    """The bound of section 4.1 for runs of symbols."""
    return segment_heads >= 1 and segment_heads * min(segment_tokens, tokens) * GROUP <= _MAX_SEGMENT
