# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles to a GPU's binary, which the interpreter cannot tell; no GPU is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = {
    "_attend_rows_kernel",
    "_best_similarity_kernel",
    "_logits_kernel",
    "_merge_splits_kernel",
    "_rotate_gather_kernel",
    "_shares_kernel",
    "_sum_kernel",
    "_summary_kernel",
}
SHARED_NBYTES = 99 << 10  # what the smallest GPU of interest gives a program: sm_86, sm_89

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

_LAUNCHES = """
import json, sys, torch
from kvstore.kernels import attend_rows_triton, maxsim_triton, rotate_gather_triton, scoring_triton, summary_triton
from kvstore.kernels.scoring_reference import Agreement
from tests.compiled_kernels import compiling
from tests.paged_pools import Geometry, make_case

with compiling(int(sys.argv[1])) as taken:
    dtype = torch.bfloat16
    starts = torch.tensor([0, 8], dtype=torch.int32)
    plane, rows = torch.ones(2, 2, 16, 128, dtype=dtype), torch.ones(2, 16, 128, dtype=dtype)
    rotate_gather_triton.rotate_gather(plane, plane, starts[:1], starts, rows[0], rows[0], rows, rows)
    maxsim_triton.best_similarity(rows[0], rows[0], starts)
    for group, num_asking in (("sum", 1), ("softmax_mean", 80)):
        scoring_triton.score_units(torch.ones(2, num_asking, 128, dtype=dtype), rows, None, Agreement(group))
    for dtype, dim, half, num_queries in (
        (torch.bfloat16, 128, 64, 1), (torch.bfloat16, 256, 32, 16), (torch.float32, 256, 128, 16)
    ):
        shape = {"group": 4, "key_dim": dim, "value_dim": dim, "half": half, "num_rows": 200, "has_bias": True}
        case = make_case(Geometry(num_queries=num_queries, dtype=dtype, **shape))
        attend_rows_triton.attend_rows(
            case.query, case.keys, case.values, case.rows, rotation=case.rotation, bias=case.bias, scale=case.scale
        )
    units = case.rows.view(2, 1, 200)
    summary_triton.summarise_rows(case.keys, units, rotation=case.rotation, kind="cuboid_mean")
    summary_triton.summarise_rows(case.keys, units, rotation=None, kind="mean")
print(json.dumps(taken))
"""


@pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_kernels_compile_and_fit(capability: int, tmp_path: Path) -> None:
    # A process of its own: in this one, Triton interprets.
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _LAUNCHES, str(capability)]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    taken = json.loads(done.stdout)
    assert taken.keys() == KERNELS
    assert max(taken.values()) <= SHARED_NBYTES, taken
