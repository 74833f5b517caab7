# SPDX-License-Identifier: Apache-2.0
"""Loads a language or vision-language model from a local folder or GGUF file; never from a hub."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
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
from kvstore.errors import ConfigError, KVStoreError, MissingDependencyError, StoreIOError

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
        MissingDependencyError: its tokenizer or image processor needs a package that is not installed.
        StoreIOError: the folder of converted models cannot be written.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such model; give a Hugging Face folder or a GGUF file")
    transformers_logging.disable_progress_bar()
    folder = _converted(path, converted) if path.is_file() else path
    sees = _model_type(folder) in FAMILIES
    image_processor = _image_processor(folder) if sees else None
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with _naming_errors(f"{folder}: transformers cannot load it"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        loaded: Any = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    model: PreTrainedModel = _complete(folder, loaded)
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
    with _naming_errors(f"{folder}: transformers cannot load its image processor"):
        try:
            # Pillow's even where torchvision is installed: their pixels differ, and a stream must go on with the same.
            return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        except (ImportError, ValueError) as error:
            if "torchvision" not in str(error).lower():
                raise
            raise MissingDependencyError(
                f"{folder}: its image processor exists for torchvision only: pip install torchvision"
            ) from error


def _complete(path: Path, loaded: tuple[Any, dict[str, Any]]) -> Any:
    """The model that was loaded, if it was whole: transformers fills what is missing with random numbers."""
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(f"{path}: incomplete, {len(missing)} weights are missing, e.g. {missing[0]}")
    return model


@contextmanager
def _naming_errors(what: str) -> Iterator[None]:
    """Turn whatever transformers raises over a file that it cannot read, which is errors of every kind, into ours."""
    try:
        yield
    except KVStoreError:
        raise
    except BaseException as error:
        # Its tokenizers are written in Rust, and a panic there is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = MissingDependencyError if isinstance(error, ImportError) else ConfigError
        raise kind(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """What went wrong, without the paragraphs of advice that transformers adds."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first


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
    # Its progress bar listens to no setting of transformers.
    with _naming_errors(f"{gguf}: not a GGUF file that transformers can load"), redirect_stderr(io.StringIO()):
        config = AutoConfig.from_pretrained(gguf.parent, **where)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, output_loading_info=True, **where
        )
        # The loaded config still says "quantized", which save_pretrained refuses: the same weights under a plain one.
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(_complete(gguf, loaded).state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sampled_digest(path: Path) -> str:
    digest = hashlib.blake2b(path.stat().st_size.to_bytes(8, "little"), digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_NBYTES))
        file.seek(max(path.stat().st_size - _SAMPLE_NBYTES, 0))
        digest.update(file.read(_SAMPLE_NBYTES))
    return digest.hexdigest()
