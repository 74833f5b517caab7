# SPDX-License-Identifier: Apache-2.0
"""The calibrations of one store: found by the id in a record, decided for a model, kept in memory once read."""

from __future__ import annotations

from threading import Lock

from kvstore.calibration import CALIBRATION_ID_NBYTES, Calibration
from kvstore.decision import Decision
from kvstore.errors import CorruptRecordError, UnsupportedFormatError
from kvstore.spec import ModelSpec
from kvstore.tiers.catalogue import Catalogue, WriteView
from kvstore.tiers.tables.calibrations import decisions, find_calibration, find_decision, put_calibration, put_decision

_NONE = bytes(CALIBRATION_ID_NBYTES)


class Calibrations:
    """Calibration objects and decisions in a catalogue. Thread-safe.

    Args:
        catalogue: the store's.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._known: dict[bytes, Calibration] = {}
        self._decided: dict[str, Decision] = {}
        self._keeping = Lock()

    def find(self, identity: bytes) -> Calibration | None:
        """The object that a record names; None for a record that names none.

        Raises:
            CorruptRecordError: the store does not hold it, or it is damaged.
        """
        if identity == _NONE:
            return None
        if identity not in self._known:
            with self._catalogue.read() as view:
                found = find_calibration(view, identity)
            if found is None:
                raise CorruptRecordError(f"it needs calibration {identity.hex()}, which the store does not hold")
            self._known[identity] = found
        return self._known[identity]

    def has_bases(self, spec: ModelSpec) -> bool:
        """Whether new blocks of a model can be coded in bases; False also where what was decided cannot be read."""
        try:
            decision = self.of_model(spec)
            found = None if decision is None else self.find(decision.calibration)
        except (CorruptRecordError, UnsupportedFormatError):
            return False
        return found is not None and found.has_bases

    def of_model(self, spec: ModelSpec) -> Decision | None:
        """What was decided for a model; None before it is calibrated.

        Raises:
            CorruptRecordError: the entry is damaged.
        """
        fingerprint = spec.fingerprint
        if fingerprint not in self._decided:
            with self._catalogue.read() as view:
                found = find_decision(view, fingerprint)
            if found is None:
                return None
            return self._decided.setdefault(fingerprint, found)  # another thread may have decided meanwhile
        return self._decided[fingerprint]

    def all(self) -> list[tuple[str, Decision]]:
        """Fingerprints of all calibrated models, with what was decided for each."""
        with self._catalogue.read() as view:
            return list(decisions(view))

    def hold(self, calibration: Calibration) -> None:
        """Store an object for the records that name it, and decide nothing; raises `ReadOnlyError`."""
        self._catalogue.write(lambda view: put_calibration(view, calibration))
        self._known[calibration.id] = calibration

    def keep(self, spec: ModelSpec, calibration: Calibration, decision: Decision, *, replace: bool = True) -> None:
        """Store an object, and the decision to use it for blocks that are written from now on.

        Args:
            spec: the model.
            calibration: the object that `decision` names.
            decision: what holds.
            replace: whether an earlier decision gives way; without, this one is dropped where there is one.

        Raises:
            SpecMismatchError: the object was made from a model of another shape.
            ReadOnlyError: the store is open for reading.
        """
        calibration.check_spec(spec)
        fingerprint = spec.fingerprint

        def put(view: WriteView) -> bool:
            if not replace and find_decision(view, fingerprint) is not None:
                return False
            put_decision(view, fingerprint, calibration, decision)
            return True

        with self._keeping:  # what is in memory follows in the order of the commits
            if self._catalogue.write(put):
                self._known[calibration.id] = calibration
                self._decided[fingerprint] = decision
