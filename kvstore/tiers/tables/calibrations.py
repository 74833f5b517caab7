# SPDX-License-Identifier: Apache-2.0
"""Table `calibrations`: calibration objects by what they hold, and per model the decision which one to use."""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.calibration import Calibration
from kvstore.decision import Decision
from kvstore.errors import CorruptRecordError
from kvstore.tiers.catalogue import ReadView, Table, WriteView

_OBJECT = b"o"  # then the object's id
_MODEL = b"m"  # then the model's fingerprint


def find_calibration(view: ReadView, identity: bytes) -> Calibration | None:
    """Look up an object.

    Raises:
        CorruptRecordError: what is stored under that name is damaged, or something else.
        UnsupportedFormatError: it is in a newer format.
    """
    data = view.get(Table.CALIBRATIONS, _OBJECT + identity)
    if data is None:
        return None
    found = Calibration(data)
    if found.id != identity:
        raise CorruptRecordError(f"calibration {identity.hex()}: the catalogue holds another under that name")
    return found


def find_decision(view: ReadView, fingerprint: str) -> Decision | None:
    """Look up what was decided for a model; raises `CorruptRecordError` for what is no decision."""
    data = view.get(Table.CALIBRATIONS, _MODEL + fingerprint.encode())
    return None if data is None else Decision.from_json(data)


def put_calibration(view: WriteView, calibration: Calibration) -> None:
    """Store an object, for the records that name it."""
    view.put(Table.CALIBRATIONS, _OBJECT + calibration.id, calibration.data)


def put_decision(view: WriteView, fingerprint: str, calibration: Calibration, decision: Decision) -> None:
    """Store an object and the decision to use it; the objects of earlier decisions stay, for the blocks that need them.

    Args:
        view: the transaction.
        fingerprint: the model's.
        calibration: the object that `decision` names.
        decision: what to do from now on.
    """
    assert calibration.id == decision.calibration, "a decision names its object"
    put_calibration(view, calibration)
    view.put(Table.CALIBRATIONS, _MODEL + fingerprint.encode(), decision.to_json())


def parse_row(key: bytes, value: bytes) -> Calibration | Decision:
    """Read a row of the table, whichever it is.

    Raises:
        CorruptRecordError: it is damaged, or under a key that no writer makes.
        UnsupportedFormatError: it is in a newer format.
    """
    if key[:1] == _MODEL:
        return Decision.from_json(value)
    found = Calibration(value)
    if key != _OBJECT + found.id:
        raise CorruptRecordError(f"calibration {found.id.hex()} under another name")
    return found


def decisions(view: ReadView) -> Iterator[tuple[str, Decision]]:
    """Yield the fingerprints of all calibrated models and what was decided for each."""
    for key, value in view.scan(Table.CALIBRATIONS, prefix=_MODEL):
        yield key[len(_MODEL) :].decode(errors="replace"), Decision.from_json(value)
