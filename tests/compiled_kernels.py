# SPDX-License-Identifier: Apache-2.0
"""Compiles for GPUs that need not be there: whoever launches a Triton kernel inside `compiling` gets its binary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


@contextmanager
def compiling(capability: int) -> Iterator[dict[str, int]]:
    """Compile what is launched, with the types and the constants of that launch, and run nothing.

    Args:
        capability: of the GPU, 80 for sm_80.

    Yields:
        Bytes of shared memory that a program of each kernel takes, by name; the most of all launches.
    """
    taken: dict[str, int] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        signature, constants, hints = {}, {}, {}
        given = dict(zip(self.arg_names, args, strict=False)) | named
        for number, param in enumerate(self.params):
            value = given[param.name]
            if param.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[param.name], constants[(number,)] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[param.name], hints[(number,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[param.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    hints[(number,)] = [["tt.divisibility", 16]]
        options = {name: value for name, value in named.items() if name in _OPTIONS}
        source = ASTSource(self, signature, constants, hints)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        taken[self.__name__] = max(taken.get(self.__name__, 0), binary.metadata.shared)

    launch, triton.JITFunction.run = triton.JITFunction.run, compile_only
    try:
        yield taken
    finally:
        triton.JITFunction.run = launch
