# SPDX-License-Identifier: Apache-2.0
"""What can be attached, for annotations of modules that do without transformers."""

from __future__ import annotations

from transformers import PreTrainedModel

Model = PreTrainedModel
"""A transformers model."""
