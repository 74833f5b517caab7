#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Creates the virtual environment, or brings it up to date: make_venv.sh FOLDER EXTRAS
#
# torch goes in first, so that nothing installed later chooses it. Which torch:
#   a GPU, and a torch with CUDA in the system's Python -> that one, with all that is installed beside it;
#   anything else                                      -> the one that constraints.txt pins.
# Everything else is pinned by constraints.txt. Without a network, pip's own settings find carried wheels:
#   PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels make venv EXTRAS=transformers,test
set -euo pipefail

venv=$1
extras=$2
python=${PYTHON:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pins=constraints.txt

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "make_venv: $python is $("$python" --version 2>&1); kvstore needs Python 3.11 or newer (set PYTHON=...)" >&2
    exit 1
}
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"

if nvidia-smi >/dev/null 2>&1 && "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "make_venv: using the torch with CUDA of $python"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # A path file, not --system-site-packages: that option looks past a $python which lives in an environment itself.
    "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' >"$site/_system_packages.pth"
    # What the system has is taken as it is, so it must not meet our pins.
    "$python" - "$pins" >"$venv/constraints.txt" <<'PY'
import re
import sys
from importlib.metadata import distributions


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


present = {canonical(found.metadata["Name"]) for found in distributions()}
pins = (line for line in open(sys.argv[1]) if line[0] not in "#\n")
sys.stdout.writelines(line for line in pins if canonical(line.split("==")[0]) not in present)
PY
    pins=$venv/constraints.txt
    # A second faiss would shadow the system's (docs/packaging.md).
    if "$python" -c 'import faiss' 2>/dev/null; then extras=${extras/#cpu,/}; fi
fi

pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$pins")
"${pip[@]}" torch
# No build isolation: an isolated build would fetch its requirements again, past the pins.
mapfile -t build_requires < <("$venv/bin/python" -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")')
"${pip[@]}" "${build_requires[@]}"
"${pip[@]}" --no-build-isolation --editable ".[$extras]"

"$venv/bin/python" - <<'PY'
import torch

from kvstore.extras import faiss_distribution

device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
print(f"make_venv: torch {torch.__version__} ({device}), {faiss_distribution() or 'no FAISS'}")
PY
