# SPDX-License-Identifier: Apache-2.0
"""Optional packages: which extra brings a module, and which FAISS distribution is installed; imports none of them."""

from __future__ import annotations

from importlib.metadata import packages_distributions

from kvstore.errors import ConfigError, MissingDependencyError

_EXTRAS_OF = {
    "av": ("video",),
    "faiss": ("cpu", "gpu"),
    "faster_whisper": ("video",),
    "mooncake": ("remote",),
    "prometheus_client": ("metrics",),
    "tesserocr": ("video",),
    "transformers": ("transformers",),
}


def missing_dependency(module: str, purpose: str) -> MissingDependencyError:
    """Make the error for an optional module that could not be imported.

    Args:
        module: the top-level module, e.g. `faiss`.
        purpose: what needs it, as the subject of a sentence, e.g. `the FAISS index`.

    Returns:
        An error whose message names the extra to install; raise it `from` the ImportError.
    """
    return MissingDependencyError(f"{purpose} needs the module {module}: {_install(*_EXTRAS_OF[module])}")


def faiss_distribution() -> str | None:
    """Name the installed distribution that provides the module `faiss`.

    faiss-cpu and faiss-gpu write the same files and pip lets both in, so the later one wins silently; removing either
    breaks the other. Reads package metadata only: takes about 0.1 s, so call it once, when an index is built.

    Returns:
        The distribution's name, e.g. `faiss-cpu`; None without FAISS.

    Raises:
        ConfigError: more than one is installed.
    """
    names = sorted(set(packages_distributions().get("faiss", ())))
    if len(names) > 1:
        raise ConfigError(
            f"{' and '.join(names)} are both installed and overwrite each other's module faiss; keep one: "
            f"pip uninstall -y {' '.join(names)}, then {_install(*_EXTRAS_OF['faiss'])}"
        )
    return names[0] if names else None


def _install(*extras: str) -> str:
    return " or ".join(f"pip install 'tiered-kvstore[{extra}]'" for extra in extras)
