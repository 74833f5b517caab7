# SPDX-License-Identifier: Apache-2.0
"""Policies by name: every file in `policies/` defines one."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.retrieval.policy import Policy


@functools.cache
def policies() -> dict[str, Policy]:
    """All policies by name; a file in `policies/` is one, by its `POLICY`."""
    names = sorted(path.stem for path in Path(__file__).parent.joinpath("policies").glob("*.py"))
    found = [importlib.import_module(f"kvstore.retrieval.policies.{name}").POLICY for name in names]
    return {policy.name: policy for policy in found}


def policy_named(name: str) -> Policy:
    """Look a policy up.

    Raises:
        ConfigError: no such policy; the message lists them.
    """
    try:
        return policies()[name]
    except KeyError:
        raise ConfigError(f"no policy named {name!r}; use one of {', '.join(policies())}") from None
