# SPDX-License-Identifier: Apache-2.0
"""Builds kvstore._native and maps the packages; the project's metadata lives in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext

VERSION = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
ROOTS = {"kvstore.retrieval": "retrieval", "kvstore.kernels": "kernels"}
PACKAGES = [*find_packages(include=["kvstore", "kvstore.*"]), *ROOTS]
for name, root in ROOTS.items():
    PACKAGES += [f"{name}.{part}" for part in find_namespace_packages(root, exclude=["*__pycache__"])]
SOURCES = sorted(str(path) for path in Path("csrc").glob("*/*.cpp"))
FLAGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-MMD"]
FLAGS += ["-ffp-contract=off", "-fno-trapping-math", f'-DKV_VERSION="{VERSION}"', "-isystem", pybind11.get_include()]
NVCC_FLAGS = ["-O3", "-std=c++17", "-MMD", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# compute_90 is the portable form, which machines newer than sm_90 translate when the module is loaded.
NVCC_FLAGS += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]


def find_nvcc() -> str | None:
    """Path of nvcc when this build is to contain CUDA: KVSTORE_CUDA is auto (when nvcc is there), on or off."""
    choice, nvcc = os.environ.get("KVSTORE_CUDA", "auto"), shutil.which("nvcc")
    if choice not in ("auto", "on", "off") or (choice == "on" and nvcc is None):
        raise SystemExit(f"KVSTORE_CUDA={choice}: use auto, on (which needs nvcc on PATH) or off")
    return None if choice == "off" else nvcc


def is_stale(target: str, source: str) -> bool:
    """True when an object file is missing or older than what its compiler read, this file, or the version in it."""
    listing = Path(target).with_suffix(".d")
    if not Path(target).exists() or not listing.exists():
        return True
    inputs = ["setup.py", *listing.read_text().split(":", 1)[1].replace("\\\n", " ").split()]
    inputs += ["pyproject.toml"] if "KV_VERSION" in Path(source).read_text() else []
    return any(not Path(name).exists() or Path(name).stat().st_mtime > listing.stat().st_mtime for name in inputs)


class BuildNative(build_ext):
    """build_ext that links CUDA objects in when nvcc is there, and recompiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        self.force = True  # always link: which objects belong in depends on KVSTORE_CUDA
        if nvcc := find_nvcc():
            self.build_temp += "-cuda"
            dry_run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
            toolkit = re.search(r"TOP=(\S+)", dry_run.stderr)[1]
            ext.define_macros.append(("KV_WITH_CUDA", None))
            ext.library_dirs += [f"{toolkit}/lib64", f"{toolkit}/lib"]
            ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
            for source in sorted(Path("csrc/cuda").glob("*.cu")):
                target = Path(self.build_temp, source).with_suffix(".cu.o")
                target.parent.mkdir(parents=True, exist_ok=True)
                if is_stale(str(target), str(source)):
                    files = ["-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
                    self.spawn([nvcc, *NVCC_FLAGS, "-DKV_WITH_CUDA", *files])
                ext.extra_objects.append(str(target))
        super().build_extension(ext)


ParallelCompile("KVSTORE_BUILD_JOBS", needs_recompile=is_stale, default=2).install()
setup(
    packages=PACKAGES,
    package_dir=ROOTS,
    ext_modules=[
        Extension("kvstore._native", SOURCES, include_dirs=["csrc"], extra_compile_args=FLAGS, language="c++")
    ],
    cmdclass={"build_ext": BuildNative},
)
