"""Compile the kernels that a call of `triton_gpu.Segments` would launch, for a GPU that is not there.

Run as a program in a process in which Triton does not interpret; see `test_triton_segments`.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import triton
from step_segments import made
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowkey.backends import triton_gpu, triton_kernel
from lowkey.backends.stored import Rebuilding

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
TYPES |= {torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}
SHARED = {80: 163 * 2**10, 90: 227 * 2**10}  # bytes of shared memory that a program may have
FORMS = {  # packings of keys and values, dtype, channels, compute capability
    "plain": ("plain", "plain", torch.bfloat16, 128, 80),
    "token": ("token4", "token8", torch.float16, 96, 90),
    "channel": ("channel2", "token2", torch.bfloat16, 128, 90),
    "exact": ("plain", "token4", torch.float32, 256, 80),
    "rotated": ("token4", "token4", torch.bfloat16, 160, 80),
}


def type_of(x):
    """What Triton calls the type of an argument."""
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype]
    if isinstance(x, tuple):
        return tuple(map(type_of, x))
    return "fp32" if isinstance(x, float) else "i32"


def aligned(args):
    """Which arguments are multiples of 16, as a launch would find them."""
    found = {}
    for i, x in enumerate(args):
        for j, y in enumerate(x) if isinstance(x, tuple) else [(None, x)]:
            if isinstance(y, torch.Tensor) or (isinstance(y, int) and y % 16 == 0):
                found[(i,) if j is None else (i, j)] = [["tt.divisibility", 16]]
    return found


class Compiler:
    """Stands for a kernel: a launch compiles it and notes what came out."""

    def __init__(self, function, capability, found):
        self.function, self.capability, self.found = function, capability, found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, **constants):
        names = self.function.arg_names
        if "EXACT" in constants:
            constants["EXACT"] = args[0].dtype == torch.float32  # as on a GPU
        signature = {name: type_of(x) for name, x in zip(names, args, strict=False)}
        source = ASTSource(
            self.function,
            signature | dict.fromkeys(constants, "constexpr"),
            {(names.index(name),): x for name, x in constants.items()},
            aligned(args),
        )
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", self.capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        self.found.append(compiled)


def compiled_kernels(segments, queries, capability, softcap=None, bias=None):
    """What the kernels of this call compile to."""
    found = []
    kernels = {
        name: Compiler(getattr(triton_kernel, name), capability, found) for name in ("attend", "merge")
    }
    triton_gpu._kernel = lambda: SimpleNamespace(**kernels)
    m = next(x for x in queries if x is not None).shape[1]
    triton_gpu.Segments(m, segments).attend(queries, 0.1, softcap, bias=bias)
    return found


def rotated(segment, d, dtype):
    """The segment with its keys as latents of heads with d channels."""
    maps = torch.zeros(3, segment.keys.width, d, dtype=dtype)
    positions, firsts = torch.zeros(400, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    tables = (np.zeros((64, 2, d // 2), np.float32),) * 2
    how = Rebuilding(maps, maps[:, 0], positions, firsts, (*tables, 0))
    return replace(segment, rebuilding=how)


def main():
    for name, (keys, values, dtype, width, capability) in FORMS.items():
        segments, _ = made([(keys, values, (300, 1, 33), name == "rotated", 0)], dtype, (width, width))
        query = torch.zeros(3, 4, 128 if name == "rotated" else width, dtype=dtype)
        if name == "rotated":
            segments = [rotated(segments[0], 128, dtype)]
        for x in compiled_kernels(segments, (None, query), capability, 30.0, torch.zeros(3, 4)):
            print(name, x.metadata.name, x.metadata.shared)
            assert x.asm["cubin"] and x.metadata.shared <= SHARED[capability], x.metadata


if __name__ == "__main__":
    main()
