# SPDX-License-Identifier: Apache-2.0
"""What importing does, and does not do: light, one name per module, and transformers left alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from kvstore import extras
from kvstore.errors import ConfigError, MissingDependencyError

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("av", "faiss", "faster_whisper", "tesserocr", "transformers", "triton")

LOADED_WITH_KVSTORE = f"""
import sys
import torch
before = set(sys.modules)
import kvstore
print(*sorted(set({HEAVY!r}) & (set(sys.modules) - before)))
"""

# One process for all modules: each new process would pay for torch again.
IMPORT_ALL = """
import importlib, os, sys
import kvstore
from kvstore.errors import MissingDependencyError
root = os.path.dirname(kvstore.__file__)
for here, folders, names in os.walk(root, followlinks=True):
    folders[:] = [name for name in folders if name != "__pycache__"]
    for name in names:
        path = os.path.relpath(os.path.join(here, name), os.path.dirname(root))
        if name.endswith(".py") and name != "__main__.py":
            module = path.removesuffix(".py").removesuffix("/__init__").replace(os.sep, ".")
            try:
                importlib.import_module(module)
            except MissingDependencyError as error:
                print("absent:", error)
ours = {name: os.path.realpath(module.__file__) for name, module in sys.modules.items()
        if getattr(module, "__file__", None) and module.__file__.endswith(".py") and name != "__main__"}
tree = os.path.dirname(os.path.realpath(root))
wrong = sorted(name for name, path in ours.items()
               if os.path.dirname(path) in (os.path.join(tree, "kernels"), os.path.join(tree, "retrieval"))
               and not name.startswith("kvstore."))
assert not wrong, wrong
"""


def run_python(code: str, cwd: Path) -> str:
    """Run code in a fresh interpreter, warnings as errors for our own modules; returns what it printed."""
    command = [sys.executable, "-W", "error:::kvstore", "-c", code]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_loads_no_optional_package(tmp_path: Path) -> None:
    assert run_python(LOADED_WITH_KVSTORE, tmp_path) == ""


def test_every_module_imports_under_one_name() -> None:
    run_python(IMPORT_ALL, ROOT)


def test_transformers_is_unharmed_in_the_root_folder() -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("the extra transformers is not installed")
    code = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    assert run_python(code, ROOT).endswith("LlamaForCausalLM")


def test_command_is_installed_and_loads() -> None:
    (command,) = entry_points(group="console_scripts", name="kvstore")
    assert callable(command.load())


@pytest.mark.parametrize(
    ("installed", "expected"),
    [({}, None), ({"faiss": ["faiss-cpu"]}, "faiss-cpu"), ({"faiss": ["faiss-gpu", "faiss-gpu"]}, "faiss-gpu")],
)
def test_one_faiss_distribution_is_named(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, list[str]], expected: str | None
) -> None:
    monkeypatch.setattr(extras, "packages_distributions", lambda: installed)
    assert extras.faiss_distribution() == expected


def test_two_faiss_distributions_are_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "packages_distributions", lambda: {"faiss": ["faiss-gpu", "faiss-cpu"]})
    with pytest.raises(
        ConfigError, match=r"faiss-cpu and faiss-gpu are both installed.*pip uninstall -y faiss-cpu faiss-gpu"
    ):
        extras.faiss_distribution()


def test_this_environment_has_at_most_one_faiss() -> None:
    extras.faiss_distribution()


def test_missing_faiss_names_both_extras() -> None:
    error = extras.missing_dependency("faiss", "the FAISS index")
    assert isinstance(error, MissingDependencyError)
    assert "pip install 'tiered-kvstore[cpu]' or pip install 'tiered-kvstore[gpu]'" in str(error)
