# SPDX-License-Identifier: Apache-2.0
"""Damaged and forged records of every coding: refused with a type, or read as the oracle reads them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvstore.calibration import Calibration as NativeCalibration
from kvstore.errors import CorruptRecordError, SpecMismatchError, UnsupportedFormatError
from tests.oracle.blocks import Geometry, random_block, random_calibration
from tests.oracle.calibration import Calibration, calibration_id, parse_calibration
from tests.oracle.elements import Bits, Dtype
from tests.oracle.native_side import geometry_of, native_decode, native_decode_as
from tests.oracle.random_bases import with_random_bases
from tests.oracle.record import Coding, Profile, decode_record, parse_record
from tests.oracle.sealing import flipped, sealed_calibration, sealed_record
from tests.oracle.writer import Settings, encode_record

DTYPE = Dtype.BFLOAT16
REFUSALS = (CorruptRecordError, UnsupportedFormatError, SpecMismatchError)
# Settings, elements, calibrated or not, and the fewest tokens with which planes shrink.
SAMPLES = {
    "raw": (Settings(Profile.RAW), "kv", False, 24),
    "zstd": (Settings(Profile.ZSTD), "kv", False, 24),
    "lossless": (Settings(Profile.LOSSLESS), "kv", False, 64),
    "q8": (Settings(Profile.Q8, 32, 32), "kv", False, 24),
    "q8-calibrated": (Settings(Profile.Q8, 32, 32), "kv", True, 24),
    "q4": (Settings(Profile.Q4, 16, 12), "spiked", False, 24),
    "q4-calibrated": (Settings(Profile.Q4, 16, 12), "spiked", True, 24),
    "q3-by-channel": (Settings(Profile.Q3, 8, 3, channel_values=True), "kv", False, 24),
    "q2-rows-apart": (Settings(Profile.Q2, 3, -2), "rows", True, 24),
    "pca": (Settings(Profile.PCA, 4, 4), "kv", True, 24),
}

Sample = tuple[bytes, Calibration | None, list[Bits]]


@pytest.fixture(scope="module", params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> Sample:
    """A small record, its calibration, and its elements."""
    settings, flavour, is_calibrated, num_tokens = SAMPLES[request.param]
    is_group = settings.profile is Profile.PCA
    rng = np.random.default_rng(6 if is_group else 5)
    planes = random_block(rng, Geometry(1 + is_group, 1, 10, 7, num_tokens), DTYPE, flavour)
    calibration = random_calibration(rng, planes, DTYPE) if is_calibrated else None
    if is_group and calibration:
        calibration = with_random_bases(np.random.default_rng(0), planes, calibration, DTYPE)
    record = encode_record(planes, DTYPE, settings, 0, calibration)
    if settings.profile is not Profile.RAW:
        assert any(plane.coding is not Coding.RAW for plane in parse_record(record)[1])
    if is_group:
        assert [plane.is_follower for plane in parse_record(record)[1]] == [False, False, True, True]
    return record, calibration, native_decode(record, calibration)


def outcome(decode: Callable[[bytes], list[Bits]], record: bytes) -> str | bytes:
    """The refusal's type, or the elements."""
    try:
        return b"".join(plane.tobytes() for plane in decode(record))
    except REFUSALS as error:
        return type(error).__name__


def test_truncation_at_every_length_is_refused(sample: Sample) -> None:
    record, calibration, elements = sample
    for nbytes in range(len(record)):
        with pytest.raises(CorruptRecordError):
            native_decode_as(record[:nbytes], geometry_of(elements), DTYPE, calibration)


def test_every_single_flipped_bit_is_refused(sample: Sample) -> None:
    record, calibration, elements = sample
    for bit in range(8 * len(record)):
        with pytest.raises(REFUSALS):
            native_decode_as(flipped(record, bit), geometry_of(elements), DTYPE, calibration)


def check_forgeries(sample: Sample, bits: list[int]) -> None:
    record, calibration, _ = sample
    known = {calibration_id(calibration.pack()): calibration} if calibration else {}
    for bit in bits:
        forged = sealed_record(flipped(record, bit))
        ours = outcome(lambda record: native_decode(record, calibration), forged)
        theirs = outcome(lambda record: decode_record(record, known)[1], forged)
        assert ours == theirs, f"bit {bit % 8} of byte {bit // 8}"


def test_forged_bits_with_right_checksums_read_as_the_oracle_reads_them(sample: Sample) -> None:
    bits = np.random.default_rng(1).permutation(8 * len(sample[0]))[:60]
    in_header = [bit for byte in (*range(4, 8), *range(12, 64)) for bit in (8 * byte, 8 * byte + 7)]

    check_forgeries(sample, [*bits.tolist(), *in_header])


@pytest.mark.slow
def test_many_forged_bits_with_right_checksums_read_as_the_oracle_reads_them(sample: Sample) -> None:
    check_forgeries(sample, np.random.default_rng(2).permutation(8 * len(sample[0]))[:4000].tolist())


def calibration_outcome(parse: Callable[[bytes], object], packed: bytes) -> str:
    try:
        parse(packed)
    except REFUSALS as error:
        return type(error).__name__
    return "accepted"


@pytest.fixture(scope="module", params=["planes", "bases"])
def packed_calibration(request: pytest.FixtureRequest) -> bytes:
    rng = np.random.default_rng(6)
    if request.param == "planes":
        return random_calibration(rng, random_block(rng, Geometry(1, 1, 10, 7, 24), DTYPE, "kv"), DTYPE).pack()
    planes = random_block(rng, Geometry(3, 1, 3, 2, 4), DTYPE, "kv")
    calibration = with_random_bases(np.random.default_rng(0), planes, random_calibration(rng, planes, DTYPE), DTYPE)
    assert calibration.bases is not None
    assert any(basis.rank for basis in calibration.bases.groups)
    return calibration.pack()


def test_damaged_calibrations_are_refused(packed_calibration: bytes) -> None:
    for nbytes in range(len(packed_calibration)):
        with pytest.raises(CorruptRecordError):
            NativeCalibration(packed_calibration[:nbytes])
    for bit in range(8 * len(packed_calibration)):
        with pytest.raises(REFUSALS):
            NativeCalibration(flipped(packed_calibration, bit))


def test_forged_calibrations_are_taken_or_refused_as_the_oracle_does(packed_calibration: bytes) -> None:
    for bit in range(8 * len(packed_calibration)):
        forged = sealed_calibration(flipped(packed_calibration, bit))
        assert calibration_outcome(NativeCalibration, forged) == calibration_outcome(parse_calibration, forged), bit
