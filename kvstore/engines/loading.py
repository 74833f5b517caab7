# SPDX-License-Identifier: Apache-2.0
"""Loads a language or vision-language model from a local folder or GGUF file; never from a hub."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from kvstore.engines.pictures import FAMILIES
from kvstore.errors import ConfigError, MissingDependencyError, StoreIOError

_SAMPLE_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model and its tokenizer.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the transformers tokenizer.
        path: where it was loaded from.
        image_processor: makes the pixel values of a vision-language model; None for one that reads text only.
    """

    model: PreTrainedModel
    tokenizer: Any
    path: Path
    image_processor: Any = None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def load_model(path: Path, converted: Path, dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
    """Load a model onto the GPU where there is one, else onto the CPU.

    Args:
        path: a Hugging Face model folder, or a GGUF file.
        converted: folder in which a GGUF file is kept as safetensors, so that it is converted once.
        dtype: dtype of the weights, and so of keys and values.

    Raises:
        ConfigError: there is no such model, or transformers cannot read it.
        MissingDependencyError: its image processor needs a package that is not installed.
        StoreIOError: the folder of converted models cannot be written.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such model; give a Hugging Face folder or a GGUF file")
    transformers_logging.disable_progress_bar()
    folder = _converted(path, converted) if path.is_file() else path
    sees = _model_type(folder) in FAMILIES
    image_processor = _image_processor(folder) if sees else None
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        loaded: Any = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{folder}: transformers cannot load it: {_first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    found: dict[str, Any] = loaded[1]
    if found["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(found["missing_keys"])
        raise ConfigError(f"{folder}: incomplete, {len(missing)} weights are missing, e.g. {missing[0]}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device)  # transformers wraps its own `to` without types
    if device.type == "cpu":
        # Weights are mapped from their file. All are read by the first forward but the table of words, which would
        # creep in with every new word of a long text and look like a leak.
        words: Any = model.get_input_embeddings()
        words.weight.sum()
    return LanguageModel(model.eval(), tokenizer, path, image_processor)


def _model_type(folder: Path) -> str:
    """The architecture that a folder names; refused here if it does not: transformers would list all that it knows."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: no config.json; not a Hugging Face model folder")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON file: {_first_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ConfigError(f"{path}: names no model_type; not the configuration of a Hugging Face model")
    model_type: str = config["model_type"]
    if "vision_config" in config and model_type not in (*FAMILIES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise ConfigError(
            f"{path}: the vision tower of {model_type} cannot be fed; those that can: {', '.join(FAMILIES)}"
        )
    return model_type


def _image_processor(folder: Path) -> Any:
    try:
        # Pillow's even where torchvision is installed: their pixels differ, and a stream must go on with the same.
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        if "torchvision" in str(error).lower():
            raise MissingDependencyError(
                f"{folder}: its image processor exists for torchvision only: pip install torchvision"
            ) from error
        raise ConfigError(f"{folder}: transformers cannot load its image processor: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """What went wrong, without the paragraphs of advice that transformers adds."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _converted(gguf: Path, root: Path) -> Path:
    """The safetensors folder of a GGUF file, made on first use; complete or absent, never half there."""
    try:
        home = root / f"{gguf.stem}-{_sampled_digest(gguf)}"
    except OSError as error:
        raise ConfigError(f"{gguf}: cannot be read: {error.strerror}") from error
    if (home / "config.json").is_file():
        return home
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".convert-") as scratch:
            made = Path(scratch) / "model"
            _convert(gguf, made)
            made.replace(home)
    except (OSError, SafetensorError) as error:
        if not (home / "config.json").is_file():  # another process may have finished first
            raise StoreIOError(f"{home}: cannot keep the converted model: {_first_line(error)}") from error
    return home


def _convert(gguf: Path, folder: Path) -> None:
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        # Its progress bar listens to no setting of transformers.
        with redirect_stderr(io.StringIO()):
            config = AutoConfig.from_pretrained(gguf.parent, **where)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{gguf}: not a GGUF file that transformers can load: {_first_line(error)}") from error
    # The loaded config still says "quantized", and save_pretrained refuses that; the same weights under a plain one.
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sampled_digest(path: Path) -> str:
    digest = hashlib.blake2b(path.stat().st_size.to_bytes(8, "little"), digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_NBYTES))
        file.seek(max(path.stat().st_size - _SAMPLE_NBYTES, 0))
        digest.update(file.read(_SAMPLE_NBYTES))
    return digest.hexdigest()
