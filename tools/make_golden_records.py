# SPDX-License-Identifier: Apache-2.0
"""Writes records to be decoded for ever: `PYTHONPATH=. python tools/make_golden_records.py tests/golden/codec-N`.

A folder holds what the writers of one version made; it is never written again. Elements are kept as their hash.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from tests.oracle.blocks import Geometry, random_block, random_calibration
from tests.oracle.calibration import Calibration, calibration_id
from tests.oracle.elements import Bits, Dtype
from tests.oracle.free_records import free_record
from tests.oracle.native_side import native_decode, native_encode
from tests.oracle.random_bases import with_random_bases
from tests.oracle.record import NO_CALIBRATION, Profile, decode_record, parse_record
from tests.oracle.writer import Settings, encode_record

_SMALL = Geometry(1, 2, 40, 24, 24)
_FOUR_TABLES = Geometry(1, 2, 128, 16, 64)
_WIDE = Geometry(1, 1, 200, 65, 21)
_LOSSY = {
    Profile.Q8: Settings(Profile.Q8, 32, 32),
    Profile.Q4: Settings(Profile.Q4, 16, 12),
    Profile.Q3: Settings(Profile.Q3, 8, 3),
    Profile.Q2: Settings(Profile.Q2, 3, -2),
}
_NUM_FREE = 24
_NUM_FREE_GROUPS = 6


def _digest(planes: list[Bits]) -> str:
    return hashlib.sha256(b"".join(plane.tobytes() for plane in planes)).hexdigest()


class _Folder:
    """Collects records that native code and oracle agree on."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.digests: dict[str, str] = {}

    def add(self, name: str, record: bytes, calibration: Calibration | None) -> None:
        if parse_record(record)[0].calibration == NO_CALIBRATION:
            calibration = None
        known = {calibration_id(calibration.pack()): calibration} if calibration else {}
        elements = decode_record(record, known)[1]
        again = native_decode(record, calibration)
        if _digest(again) != _digest(elements):
            raise SystemExit(f"{name}: native code and oracle read different elements")
        self.files[f"{name}.kvx"] = record
        if calibration:
            self.files[f"{name}.kvcl"] = calibration.pack()
        self.digests[name] = _digest(elements)

    def add_block(
        self,
        name: str,
        dtype: Dtype,
        settings: Settings,
        geometry: Geometry = _SMALL,
        flavour: str = "kv",
        is_calibrated: bool = False,
        first_token: int = 0,
    ) -> None:
        rng = np.random.default_rng(len(self.digests))
        planes = random_block(rng, geometry, dtype, flavour)
        calibration = random_calibration(rng, planes, dtype) if is_calibrated else None
        if calibration and settings.profile is Profile.PCA:
            calibration = with_random_bases(np.random.default_rng(0), planes, calibration, dtype)
        record = native_encode(planes, dtype, settings, first_token, calibration)
        if settings.profile is not Profile.ZSTD and record != encode_record(
            planes, dtype, settings, first_token, calibration
        ):
            raise SystemExit(f"{name}: native code and oracle write different bytes")
        self.add(f"{settings.profile.name}-{dtype.name}-{name}".lower(), record, calibration)


def _collect() -> _Folder:
    folder = _Folder()
    for dtype in Dtype:
        for profile in (Profile.RAW, Profile.ZSTD, Profile.LOSSLESS):
            folder.add_block("plain", dtype, Settings(profile))
        folder.add_block("spiked", dtype, Settings(Profile.LOSSLESS), flavour="spiked")
        for settings in _LOSSY.values():
            folder.add_block("measured", dtype, settings)
            folder.add_block("calibrated", dtype, settings, is_calibrated=True)
    bfloat16 = Dtype.BFLOAT16
    folder.add_block("four-tables", bfloat16, Settings(Profile.LOSSLESS), _FOUR_TABLES)
    q4 = _LOSSY[Profile.Q4]
    by_channel = Settings(Profile.Q4, q4.key_mult, q4.value_mult, channel_values=True)
    folder.add_block("channel-values", bfloat16, by_channel)
    folder.add_block("channel-values-calibrated", bfloat16, by_channel, is_calibrated=True)
    folder.add_block("rows-apart", bfloat16, q4, flavour="rows")
    folder.add_block("wide", bfloat16, q4, _WIDE, is_calibrated=True)
    folder.add_block("one-token", bfloat16, q4, Geometry(2, 2, 40, 24, 1), is_calibrated=True, first_token=1)
    folder.add_block("late", bfloat16, q4, first_token=(1 << 64) - 24)
    for dtype in Dtype:
        folder.add_block("exceptions", dtype, q4, flavour="spiked", is_calibrated=True)
    for seed in range(_NUM_FREE):
        rng = np.random.default_rng(seed)
        geometry = Geometry(1, 1 + seed % 3, 24 + seed, 40 - seed, 22)
        record, calibration = free_record(rng, geometry, Dtype(seed % 3), Profile(2 + seed % 5), "kv")
        folder.add(f"free-{seed:02}", record, calibration)
    for dtype in Dtype:
        folder.add_block("groups", dtype, Settings(Profile.PCA, 2, 2), Geometry(2, 2, 20, 12, 40), is_calibrated=True)
    for seed in range(_NUM_FREE_GROUPS):
        rng = np.random.default_rng(500 + seed)
        record, calibration = free_record(rng, Geometry(3, 2, 13, 14, 30), Dtype(seed % 3), Profile.PCA, "kv")
        folder.add(f"free-group-{seed:02}", record, calibration)
    return folder


def main() -> None:
    """Fill a folder that is not there yet."""
    target = Path(sys.argv[1])
    if target.exists():
        raise SystemExit(f"{target} exists: golden records are never written again; name the folder of a new version")
    folder = _collect()
    target.mkdir(parents=True)
    for name, data in folder.files.items():
        (target / name).write_bytes(data)
    (target / "elements.json").write_text(json.dumps(folder.digests, indent=1) + "\n")
    print(f"{len(folder.digests)} records, {sum(map(len, folder.files.values()))} bytes")


if __name__ == "__main__":
    main()
