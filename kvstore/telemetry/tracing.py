# SPDX-License-Identifier: Apache-2.0
"""Spans for the tracer of the program around us, where it has one. The only importer of opentelemetry."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

try:
    from opentelemetry import trace
except ImportError:
    _TRACER = None
else:
    _TRACER = trace.get_tracer("kvstore")


def span(name: str, **attributes: int | str) -> AbstractContextManager[object]:
    """Open a span for the length of a `with` block; without OpenTelemetry, nothing.

    Args:
        name: what is done, such as `kvstore.fetch`.
        attributes: numbers and names that describe this time of it, without the prefix `kvstore.`.
    """
    if _TRACER is None:
        return nullcontext()
    return _TRACER.start_as_current_span(
        name, attributes={f"kvstore.{key}": value for key, value in attributes.items()}
    )
