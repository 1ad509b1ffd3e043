"""CUDA kernels of one thread on the CPU: the source that tinygrad renders, compiled by clang with the few instructions
spelled in C++ that readers of formats use. Kernels whose lanes work together need a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tinygrad import UOp, dtypes
from tinygrad.codegen import to_program

from tests.ops.rendering import make_renderer
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.kernel.body import KernelFn

PRELUDE = """
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(count)
struct half {
  __fp16 value;
  half() = default;
  half(float wide) : value(wide) {}
  operator float() const { return value; }
};
typedef unsigned int uint;
static uint __byte_perm(uint x, uint y, uint selector) {
  unsigned long long bytes = (unsigned long long)y << 32 | x;
  uint found = 0;
  for (int i = 0; i < 4; i++) found |= (uint)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return found;
}
static half half_of(uint word) { unsigned short bits = word; half h; __builtin_memcpy(&h, &bits, 2); return h; }
static uint bits_of(half h) { unsigned short bits; __builtin_memcpy(&bits, &h, 2); return bits; }
static uint halves_of_float8(unsigned short pair) {
  uint found = 0;
  for (int i = 0; i < 2; i++) {
    uint code = pair >> 8 * i & 255, exponent = code >> 3 & 15, mantissa = code & 7;
    float size = exponent ? (8 + mantissa) * 0x1p-10f * (1 << exponent) : mantissa * 0x1p-9f;
    found |= bits_of(half(code >> 7 ? -size : size)) << 16 * i;
  }
  return found;
}
static half fused(half a, half b, half c) { return half((float)((double)a * b + c)); }
static uint fused_pair(uint a, uint b, uint c) {
  return bits_of(fused(half_of(a), half_of(b), half_of(c)))
    | bits_of(fused(half_of(a >> 16), half_of(b >> 16), half_of(c >> 16))) << 16;
}
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
"""
INSTRUCTIONS = (
    (r'asm\("lop3\.b32 %0, %1, (\w+), (\w+), 0xea;"[^;]*\);', r"d = (w & \1) | \2;"),
    (r'asm\("fma\.rn\.f16x2 [^;]*;"[^;]*\);', "d = fused_pair(a, b, c);"),
    (r'asm\("cvt\.rn\.f16x2\.e4m3x2 [^;]*;"[^;]*\);', "d = halves_of_float8(e);"),
    (r'asm\("mov\.b32 %0, \{%1, %1\};"[^;]*\);', "d = bits_of(h) | bits_of(h) << 16;"),
)


def render(kernel: KernelFn, size: int, matrix: Matrix) -> str:
    """The source of `kernel(out of `size` words, *planes)`, without includes and tinygrad's definitions."""
    planes = [UOp.placeholder((p.numel(),), p.dtype, i + 1) for i, p in enumerate(matrix.planes)]
    sink = kernel(UOp.placeholder((size,), dtypes.uint, 0), *planes)
    source: str = to_program(sink, make_renderer("CUDA sm_90")).src[2].arg
    source = re.sub(r"^(#|typedef unsigned int uint).*$", "", source, flags=re.MULTILINE)
    for pattern, spelled in INSTRUCTIONS:
        source = re.sub(pattern, spelled, source)
    return source


def run(sources: Sequence[str], names: Sequence[str], size: int, matrices: Sequence[Matrix]) -> list[np.ndarray]:
    """The `size` words that each kernel writes."""
    text, known = [PRELUDE], set[str]()
    for source in sources:
        for line in source.splitlines():  # tinygrad's own definitions precede each kernel
            if not line.startswith("template") or line not in known:
                text.append(line)
            known.add(line)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "kernels.so")
        command = [os.environ.get("CC", "clang"), "-x", "c++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared"]
        command += ["-march=native", "-", "-o", library]
        subprocess.run(command, input="\n".join(text), text=True, check=True)
        compiled = ctypes.CDLL(library)
        for name, matrix in zip(names, matrices, strict=True):
            buffers = [np.zeros(size, np.uint32), *[plane.numpy() for plane in matrix.planes]]
            slots = _arguments("\n".join(sources), name)
            getattr(compiled, name)(*[ctypes.c_void_p(buffers[slot].ctypes.data) for slot in slots])
            found.append(buffers[0])
    return found


def _arguments(text: str, name: str) -> list[int]:
    """The buffers that a kernel takes: tinygrad leaves out those that it does not use."""
    signature = re.search(rf" {name}\((.*?)\) {{", text)
    assert signature is not None
    return [int(slot) for slot in re.findall(r"data(\d+)_", signature[1])]
