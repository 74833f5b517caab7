# SPDX-License-Identifier: Apache-2.0
"""What was decided for one model: which calibration its blocks are coded with, and which profiles keep keys exact."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

from kvstore.calibration import CALIBRATION_ID_NBYTES
from kvstore.errors import CorruptRecordError

KL_LIMITS = {"q8": 0.002, "q4": 0.002, "q3": 0.015, "q2": 0.05, "pca": 0.05}
"""Most that each lossy profile may change a model's next-token distribution: mean KL divergence, nats a token.

`q8` and `q4` promise a change that nobody can tell: 0.002 is what 8-bit KV caches are known for, and moves the
likeliest token in about 1 of 50 places, where two were all but equal. `q3` may be as far off as 4-bit KV caches
commonly are (0.010 to 0.015), `q2` and `pca` three times as far. Above its limit a profile stores keys exactly: models
that mind lossy keys are known, models that mind lossy values at these rates are not.
"""

KL_AIMS = {"q4": 0.002, "q3": 0.008, "q2": 0.021, "pca": 0.018}
"""What a profile may change where it is known how the model minds errors: its steps are then made coarser up to here.
Up to these, perplexity stayed within 1 % (`q3`) and 3 % (`q2`) of what it is with exact keys and values."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Decision:
    """What holds for all new blocks of one model.

    Args:
        calibration: id of the object that they are coded with.
        num_tokens: tokens that it was made from.
        source: where these came from, in words.
        divergence: per lossy profile, the mean KL divergence measured with it; empty where no model was at hand.
        steps: mults of keys and values for profiles whose steps are not the usual ones (FORMAT.md section 6.3).
        exact_keys: profiles that were beyond their limit and so store keys exactly, with their divergence then.
    """

    calibration: bytes
    num_tokens: int
    source: str
    divergence: dict[str, float] = field(default_factory=dict)
    steps: dict[str, tuple[int, int]] = field(default_factory=dict)
    exact_keys: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Encode for the catalogue."""
        fields = {
            "version": _VERSION,
            "calibration": self.calibration.hex(),
            "num_tokens": self.num_tokens,
            "source": self.source,
            "divergence": self.divergence,
            "steps": self.steps,
            "exact_keys": self.exact_keys,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @staticmethod
    def from_json(data: bytes) -> Decision:
        """Inverse of `to_json`.

        Raises:
            CorruptRecordError: not a decision.
        """
        try:
            fields = json.loads(data)
            if fields["version"] != _VERSION:
                raise CorruptRecordError(f"calibration decision: version {fields['version']}, not {_VERSION}")
            decision = Decision(
                bytes.fromhex(fields["calibration"]),
                int(fields["num_tokens"]),
                str(fields["source"]),
                {str(name): float(value) for name, value in fields["divergence"].items()},
                {str(name): (int(key), int(value)) for name, (key, value) in fields["steps"].items()},
                {str(name): float(value) for name, value in fields["exact_keys"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptRecordError(f"calibration decision: not one: {error}") from error
        measured = (*decision.divergence.values(), *decision.exact_keys.values())
        is_possible = (
            len(decision.calibration) == CALIBRATION_ID_NBYTES
            and all(map(math.isfinite, measured))
            and all(-128 <= mult <= 127 for steps in decision.steps.values() for mult in steps)
        )
        if not is_possible:
            raise CorruptRecordError("calibration decision: fields that no writer makes")
        return decision
