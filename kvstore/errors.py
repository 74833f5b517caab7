# SPDX-License-Identifier: Apache-2.0
"""The error tree: every failure a caller can act on has a type; nothing else is raised on purpose."""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of every error that kvstore raises deliberately."""


class ConfigError(KVStoreError, ValueError):
    """A setting is out of range, contradicts another one, or names something unknown."""


class CalibrationError(KVStoreError):
    """A model cannot be calibrated: too little memory, no gradients, or logits that are not understood."""


class ShapeError(KVStoreError, ValueError):
    """A tensor or buffer has the wrong shape, dtype, device, alignment or length."""


class MissingDependencyError(KVStoreError, ImportError):
    """An optional package is needed for this call and is not installed."""


class StoreNotFoundError(KVStoreError, FileNotFoundError):
    """There is no store at the given path."""


class StreamNotFoundError(KVStoreError, KeyError):
    """The store holds no stream of that name."""

    def __str__(self) -> str:
        # KeyError would quote the message; people read this one.
        return str(self.args[0]) if self.args else ""


class BusyError(KVStoreError):
    """Another process is the writer of this store."""


class ReadOnlyError(KVStoreError, PermissionError):
    """The store, or the folder it should live in, cannot be written."""


class CapacityError(KVStoreError):
    """A budget, the file system or the catalogue map is full; what is stored is undamaged."""


class StoreIOError(KVStoreError, OSError):
    """The operating system refused an I/O operation."""


class UnsupportedFormatError(KVStoreError):
    """The bytes are in a newer format, or use a feature, that this version cannot read."""


class CorruptRecordError(KVStoreError):
    """Stored bytes violate the format or fail their checksum."""


class SpecMismatchError(KVStoreError):
    """The stream was written by another model, or by the same model with another KV layout."""


class MediaError(KVStoreError):
    """The input is not a readable video, or holds no frames."""
