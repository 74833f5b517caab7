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
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

VERSION = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
SUBPACKAGES = ["tiers", "engines", "video", "retrieval", "kernels", "cli"]
SOURCES = sorted(str(path) for path in Path("csrc").glob("*/*.cpp"))
CUDA_SOURCES = sorted(Path("csrc/cuda").glob("*.cu"))
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion"]
FLAGS = [*WARNINGS, "-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-MMD"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-MMD", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
ARCHITECTURES = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
# Machines newer than sm_90 translate this when the module is loaded.
PTX = ["-gencode=arch=compute_90,code=compute_90"]


def find_nvcc() -> str | None:
    """Path of nvcc when this build is to contain CUDA: KVSTORE_CUDA is auto (when nvcc is there), on or off."""
    choice = os.environ.get("KVSTORE_CUDA", "auto")
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"KVSTORE_CUDA is {choice!r}; use auto, on or off")
    nvcc = None if choice == "off" else shutil.which("nvcc")
    if choice == "on" and nvcc is None:
        raise SystemExit("KVSTORE_CUDA=on, but there is no nvcc on PATH")
    return nvcc


def is_stale(target: str, _source: str) -> bool:
    """True when an object file is missing or older than anything that its compiler read, or than this file."""
    listing = Path(target).with_suffix(".d")
    if not Path(target).exists() or not listing.exists():
        return True
    inputs = ["setup.py", *listing.read_text().split(":", 1)[1].replace("\\\n", " ").split()]
    built = Path(target).stat().st_mtime
    return any(not Path(name).exists() or Path(name).stat().st_mtime > built for name in inputs)


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
            for source in CUDA_SOURCES:
                target = Path(self.build_temp, source).with_suffix(".cu.o")
                target.parent.mkdir(parents=True, exist_ok=True)
                if is_stale(str(target), str(source)):
                    flags = [*NVCC_FLAGS, "-MF", str(target.with_suffix(".d")), *ARCHITECTURES, *PTX]
                    self.spawn([nvcc, *flags, "-DKV_WITH_CUDA", "-c", str(source), "-o", str(target)])
                ext.extra_objects.append(str(target))
        super().build_extension(ext)


ParallelCompile("KVSTORE_BUILD_JOBS", needs_recompile=is_stale, default=2).install()
setup(
    packages=["kvstore", *(f"kvstore.{name}" for name in SUBPACKAGES)],
    package_dir={"kvstore.retrieval": "retrieval", "kvstore.kernels": "kernels"},
    ext_modules=[
        Extension(
            "kvstore._native",
            SOURCES,
            include_dirs=["csrc"],
            define_macros=[("KV_VERSION", f'"{VERSION}"')],
            extra_compile_args=[*FLAGS, "-isystem", pybind11.get_include()],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
