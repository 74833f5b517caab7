# SPDX-License-Identifier: Apache-2.0
"""What several files of tests share: a screen recording made once, where warps decode, and what moves bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.errors import ConfigError
from kvstore.native import IoPool

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, and any test may be the one that does.
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Shells have what runs in the background ignore Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_RECORDER = Path(__file__).parents[1] / "examples" / "record_screen.py"


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded video and what its recorder knows about it."""

    video: Path
    truth: dict[str, Any]


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Three minutes, six screens; spoken words too where espeakng-loader is installed."""
    for module in ("av", "PIL"):
        pytest.importorskip(module)
    video = tmp_path_factory.mktemp("recording") / "reading.mp4"
    subprocess.run([sys.executable, str(_RECORDER), "--out", str(video), "--hours", "0.05"], check=True)
    return Recording(video, json.loads(video.with_suffix(".json").read_text()))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where records are decoded by warps: in lock step on the CPU, and on a GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(params=["threads", "io_uring"])
def engine(request: pytest.FixtureRequest) -> str:
    """What moves the bytes of an `IoPool`."""
    try:
        IoPool(1, request.param).close()
    except ConfigError as error:
        pytest.skip(str(error))
    return str(request.param)
