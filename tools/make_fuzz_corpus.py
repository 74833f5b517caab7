# SPDX-License-Identifier: Apache-2.0
"""Writes what fuzzers and the mutation driver start from: `PYTHONPATH=. python tools/make_fuzz_corpus.py`."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np

from tests.oracle.blocks import Geometry, random_block, random_calibration
from tests.oracle.elements import Dtype
from tests.oracle.free_records import free_record
from tests.oracle.record import Coding, Profile, parse_record
from tests.oracle.writer import Settings, encode_record

CORPUS = Path(__file__).parents[1] / "tests" / "native" / "fuzz" / "corpus"
_NUM_FREE = 60
_NUM_LARGE = 12
_NUM_GROUPS = 24
_NUM_ROUND_TRIPS = 24


def _sample(record: bytes, calibration: bytes) -> bytes:
    return struct.pack("<I", len(calibration)) + calibration + record


def main() -> None:
    """Replace the corpus; the same files every time."""
    files: dict[str, bytes] = {}
    for profile in Profile:
        for dtype in Dtype:
            rng = np.random.default_rng(len(files))
            planes = random_block(rng, Geometry(1, 2, 10, 7, 22), dtype, "spiked")
            calibration = random_calibration(rng, planes, dtype)
            for known in (None, calibration) if profile.is_lossy else (None,):
                record = encode_record(planes, dtype, Settings(profile, 20, 12, bool(dtype % 2)), 0, known)
                name = f"{profile.name}-{dtype.name}{'-calibrated' if known else ''}".lower()
                files[f"decode/{name}"] = _sample(record, calibration.pack() if known else b"")
                files[f"probe/{name}"] = record[:96]
            files[f"calibration/{profile.name}-{dtype.name}".lower()] = calibration.pack()
    for seed in range(_NUM_FREE):
        rng = np.random.default_rng(1000 + seed)
        geometry = Geometry(1 + seed % 2, *(int(n) for n in rng.integers(1, (4, 20, 20, 30))))
        record, calibration = free_record(rng, geometry, Dtype(seed % 3), Profile(3 + seed % 4), "kv")
        if any(plane.coding is not Coding.RAW for plane in parse_record(record)[1]):
            files[f"decode/free-{seed}"] = _sample(record, calibration.pack())
    for seed in range(_NUM_GROUPS):
        rng = np.random.default_rng(4000 + seed)
        geometry = Geometry(3, *(int(n) for n in rng.integers(1, (3, 12, 12, 30))))
        record, calibration = free_record(rng, geometry, Dtype(seed % 3), Profile.PCA, "kv")
        if any(plane.coding is Coding.BASIS for plane in parse_record(record)[1]):
            files[f"decode/group-{seed}"] = _sample(record, calibration.pack())
            files[f"calibration/group-{seed}"] = calibration.pack()
    for seed in range(_NUM_LARGE):
        # Rows of more than one group, and more segments than a loop works on at once.
        rng = np.random.default_rng(3000 + seed)
        geometry = Geometry(1, 3, 64 + seed, 70 - seed, 36)
        record, calibration = free_record(rng, geometry, Dtype.BFLOAT16, Profile.Q4, "kv")
        files[f"decode/large-{seed}"] = _sample(record, calibration.pack())
    for seed in range(_NUM_ROUND_TRIPS):
        rng = np.random.default_rng(2000 + seed)
        elements = np.cumsum(rng.integers(-3, 4, 60)).astype("<i2").tobytes()
        files[f"round_trip/{seed}"] = rng.bytes(24) + elements

    shutil.rmtree(CORPUS, ignore_errors=True)
    for name, data in files.items():
        path = CORPUS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes")


if __name__ == "__main__":
    main()
