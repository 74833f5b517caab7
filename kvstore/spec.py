# SPDX-License-Identifier: Apache-2.0
"""Value objects that name a model's KV geometry and the blocks cut from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import NewType

from kvstore.errors import ConfigError

BlockKey = NewType("BlockKey", bytes)
"""32 bytes that name one block's content: `chain_key(parent, payload, namespace)`."""

BLOCK_KEY_NBYTES = 32
_DTYPE_NBYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_KEY_SPACES = ("pre", "post")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about a model that decides whether its stored KV can be used again.

    Args:
        num_layers: layers that hold KV.
        kv_heads: KV heads per layer (not repeated for grouped queries).
        key_dim: elements of one key vector.
        value_dim: elements of one value vector; may differ from `key_dim` (MLA).
        dtype: `bfloat16`, `float16` or `float32`, as stored.
        key_space: `pre` when keys are stored before RoPE, `post` when they arrive rotated.
        architecture: the engine's name of the model family, e.g. `llama`.
        rope: canonical JSON of the rotary parameters.
        revision: hex digest of weight samples: two fine-tunes of one shape differ here.

    Raises:
        ConfigError: a size is not a positive integer, or `dtype` or `key_space` is unknown.
    """

    num_layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    key_space: str
    architecture: str
    rope: str
    revision: str

    def __post_init__(self) -> None:
        for name in ("num_layers", "kv_heads", "key_dim", "value_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:  # specs come from files and servers, too
                raise ConfigError(f"ModelSpec.{name} is {value!r}; it must be a positive integer")
        if self.dtype not in _DTYPE_NBYTES:
            raise ConfigError(f"ModelSpec.dtype is {self.dtype!r}; use one of {sorted(_DTYPE_NBYTES)}")
        if self.key_space not in _KEY_SPACES:
            raise ConfigError(f"ModelSpec.key_space is {self.key_space!r}; use one of {_KEY_SPACES}")

    @property
    def itemsize(self) -> int:
        """Bytes of one stored element."""
        return _DTYPE_NBYTES[self.dtype]

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's K and V over all layers, uncompressed."""
        return self.num_layers * self.kv_heads * (self.key_dim + self.value_dim) * self.itemsize

    @property
    def fingerprint(self) -> str:
        """32 hex digits; the namespace of every key made with this spec."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON (sorted keys, no blanks): the text that `fingerprint` hashes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> ModelSpec:
        """Inverse of `to_json`.

        Raises:
            ConfigError: not an object with exactly the fields of `ModelSpec`.
        """
        try:
            fields = json.loads(text)
            return ModelSpec(**fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"not a ModelSpec: {error}") from error


def chain_key(parent: BlockKey | None, payload: bytes, namespace: str) -> BlockKey:
    """Name a block by its content and by all that came before it.

    Equal prefixes get equal keys, so they are stored once and shared (vLLM's block hash, SGLang's page hash).

    Args:
        parent: key of the block before it in the stream; None for the first.
        payload: what the block was computed from: token ids as little-endian int32, then any media hashes.
        namespace: spec fingerprint, profile, prefill mode: all that changes the stored bytes.

    Returns:
        32 bytes, BLAKE2b.
    """
    space = namespace.encode()
    digest = hashlib.blake2b(digest_size=BLOCK_KEY_NBYTES, person=b"kvstore-block")
    digest.update(len(space).to_bytes(4, "little") + space)
    digest.update(parent if parent is not None else bytes(BLOCK_KEY_NBYTES))
    digest.update(payload)
    return BlockKey(digest.digest())
