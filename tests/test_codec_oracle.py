# SPDX-License-Identifier: Apache-2.0
"""The native codec and the oracle make the same records of a block, and the same elements of a record."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests.oracle.calibration import Calibration, calibration_id
from tests.oracle.cases import Case, cases, group_cases
from tests.oracle.elements import Bits, Dtype
from tests.oracle.free_records import free_record
from tests.oracle.native_side import LEVELS, limited_to, native_decode, native_encode
from tests.oracle.parameters import Parameters
from tests.oracle.record import NO_CALIBRATION, Profile, decode_record, parse_record
from tests.oracle.writer import Settings, encode_record

NOT_GROUPED = tuple(profile for profile in Profile if profile is not Profile.PCA)
SAME_BYTES = tuple(profile for profile in Profile if profile not in (Profile.ZSTD, Profile.PCA))
QUICK = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
LONG = settings(max_examples=1200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def assert_same(got: list[Bits], expected: list[Bits]) -> None:
    for plane, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"plane {plane}")


def oracle_decode(record: bytes, calibration: Calibration | None) -> list[Bits]:
    known = {calibration_id(calibration.pack()): calibration} if calibration else {}
    return decode_record(record, known)[1]


def check_writers(case: Case) -> None:
    """All writers make the same bytes, and all readers the same elements of them."""
    planes, calibration = case.block()
    record = encode_record(planes, case.dtype, case.settings, case.first_token, calibration)
    elements = oracle_decode(record, calibration)
    if not case.settings.profile.is_lossy:
        assert_same(elements, planes)
    for level in LEVELS:
        with limited_to(level):
            assert native_encode(planes, case.dtype, case.settings, case.first_token, calibration) == record, level
            assert_same(native_decode(record, calibration), elements)


def check_readers(case: Case) -> None:
    """All readers make the same elements of a record that no writer makes."""
    record, calibration = free_record(case.rng, case.geometry, case.dtype, case.settings.profile, case.flavour)
    known = calibration if parse_record(record)[0].calibration != NO_CALIBRATION else None
    elements = oracle_decode(record, known)
    for level in LEVELS:
        with limited_to(level):
            assert_same(native_decode(record, known), elements)


def check_zstd(case: Case) -> None:
    """Frames may differ; what they hold may not."""
    planes, _ = case.block()
    assert_same(oracle_decode(native_encode(planes, case.dtype, case.settings, case.first_token), None), planes)
    assert_same(native_decode(encode_record(planes, case.dtype, case.settings, case.first_token)), planes)


@QUICK
@given(cases(SAME_BYTES))
def test_writers_make_the_same_bytes(case: Case) -> None:
    check_writers(case)


@QUICK
@given(group_cases())
def test_writers_make_the_same_bytes_of_groups_of_layers(case: Case) -> None:
    check_writers(case)


def test_a_record_names_no_calibration_that_it_does_not_need() -> None:
    planes = [np.ones((1, 1, 1), dtype="<u2")] * 2
    calibration = Calibration((Parameters.zeros(1, 1),) * 2)

    record = native_encode(planes, Dtype.BFLOAT16, Settings(Profile.Q8), calibration=calibration)

    assert parse_record(record)[0].calibration == NO_CALIBRATION


@QUICK
@given(group_cases())
def test_readers_agree_on_groups_that_no_writer_makes(case: Case) -> None:
    check_readers(case)


@QUICK
@given(cases(NOT_GROUPED))
def test_readers_agree_on_records_that_no_writer_makes(case: Case) -> None:
    check_readers(case)


@QUICK
@given(cases((Profile.ZSTD,)))
def test_readers_agree_on_frames_of_other_writers(case: Case) -> None:
    check_zstd(case)


@pytest.mark.slow
@LONG
@given(cases(SAME_BYTES, most_layers=3))
def test_many_writers_make_the_same_bytes(case: Case) -> None:
    check_writers(case)


@pytest.mark.slow
@LONG
@given(group_cases())
def test_many_groups_are_written_and_read_alike(case: Case) -> None:
    check_writers(case)
    check_readers(case)


@pytest.mark.slow
@LONG
@given(cases(NOT_GROUPED, most_layers=3))
def test_many_readers_agree_on_records_that_no_writer_makes(case: Case) -> None:
    check_readers(case)


@pytest.mark.parametrize("dtype", Dtype)
def test_every_element_that_a_dtype_has_is_kept_by_lossless(dtype: Dtype) -> None:
    every = np.arange(1 << 16, dtype=np.uint32)
    bits = (every << 16 | every if dtype is Dtype.FLOAT32 else every).astype(dtype.bits).reshape(4, 128, 128)
    planes = [bits, bits[:, :, :64]]

    record = native_encode(planes, dtype, Settings(Profile.LOSSLESS))

    assert record == encode_record(planes, dtype, Settings(Profile.LOSSLESS))
    assert_same(native_decode(record), planes)
