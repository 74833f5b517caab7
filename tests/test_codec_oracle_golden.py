# SPDX-License-Identifier: Apache-2.0
"""Records of every released version decode to the elements they were made of, for ever."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.oracle.calibration import Calibration, calibration_id, parse_calibration
from tests.oracle.elements import Bits
from tests.oracle.native_side import LEVELS, limited_to, native_decode, native_encode
from tests.oracle.record import Profile, decode_record
from tests.oracle.writer import Settings

GOLDEN = Path(__file__).parent / "golden"
RECORDS = sorted(path.relative_to(GOLDEN).with_suffix("").as_posix() for path in GOLDEN.glob("*/*.kvx"))
LATEST = max(path.name for path in GOLDEN.iterdir())
# A writer's records, not free ones; zstd's frames are the library's.
REWRITTEN = [name for name in RECORDS if name.startswith(f"{LATEST}/") and "/free" not in name and "/zstd" not in name]


def read(name: str) -> tuple[bytes, Calibration | None]:
    path = GOLDEN / name
    calibration = path.with_suffix(".kvcl")
    known = parse_calibration(calibration.read_bytes()) if calibration.exists() else None
    return path.with_suffix(".kvx").read_bytes(), known


def digest(planes: list[Bits]) -> str:
    return hashlib.sha256(b"".join(plane.tobytes() for plane in planes)).hexdigest()


def expected(name: str) -> str:
    folder, _, record = name.partition("/")
    return str(json.loads((GOLDEN / folder / "elements.json").read_text())[record])


def test_every_record_of_a_folder_is_there() -> None:
    listed = [f"{path.parent.name}/{name}" for path in GOLDEN.glob("*/*.json") for name in json.loads(path.read_text())]

    assert sorted(listed) == RECORDS


@pytest.mark.parametrize("name", RECORDS)
def test_golden_record_decodes_to_its_elements(name: str) -> None:
    record, calibration = read(name)
    known = {calibration_id(calibration.pack()): calibration} if calibration else {}

    assert digest(decode_record(record, known)[1]) == expected(name)
    for level in LEVELS:
        with limited_to(level):
            assert digest(native_decode(record, calibration)) == expected(name), level


@pytest.mark.parametrize("name", [name for name in REWRITTEN if "lossless" in name])
def test_todays_writer_makes_the_golden_record(name: str) -> None:
    record, _ = read(name)
    header, planes = decode_record(record)

    assert native_encode(planes, header.dtype, Settings(Profile.LOSSLESS), header.first_token) == record
