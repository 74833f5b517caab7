# SPDX-License-Identifier: Apache-2.0
"""Keys before RoPE and values of SmolLM2-135M-Instruct over the texts, computed once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvstore.engines.loading import LanguageModel, load_model
from kvstore.engines.past import read_run
from kvstore.video.assets import SMOLLM2, cache_folder, fetch
from quality.texts import PROMPT_TOKENS, Document, documents


@dataclass(frozen=True, slots=True)
class Corpus:
    """What every scheme encodes.

    Args:
        language_model: weights as the package has them, arithmetic in float32.
        documents: the texts.
        path: the cached file of keys and values, named after all that they depend on.
        keys: [documents, layers, kv_heads, PROMPT_TOKENS, head_dim] bfloat16, before RoPE.
        values: the same of the values.
    """

    language_model: LanguageModel
    documents: list[Document]
    path: Path
    keys: Tensor
    values: Tensor

    def without(self, document: int) -> list[int]:
        """The other documents: what `document` may be calibrated on."""
        return [other for other in range(len(self.documents)) if other != document]


def corpus() -> Corpus:
    """Load the model and the texts, and compute the keys and values unless this user's cache has them."""
    (name,) = SMOLLM2.files
    model = load_model(fetch(SMOLLM2) / name, cache_folder() / "converted", torch.float32)
    texts = documents(model.encode)
    digest = hashlib.sha256(repr((SMOLLM2.files, torch.__version__, [text.ids for text in texts])).encode()).hexdigest()
    path = cache_folder() / "quality" / f"{digest[:16]}.safetensors"
    if not path.is_file():
        keep(path, _computed(model, texts))
    found = load_file(path)
    return Corpus(model, texts, path, found["keys"], found["values"])


def _computed(model: LanguageModel, texts: list[Document]) -> dict[str, Tensor]:
    pieces = [torch.tensor([text.ids]).split(PROMPT_TOKENS, dim=1) for text in texts]
    runs = [read_run(model.model, *piece) for piece in pieces]
    return {
        "keys": torch.stack([run.keys for run in runs]).bfloat16(),
        "values": torch.stack([run.values for run in runs]).bfloat16(),
    }


def keep(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file that is complete or absent, never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
        save_file(tensors, Path(scratch) / path.name)
        (Path(scratch) / path.name).replace(path)
