"""Kernels on CUDA move codes and rows in vectors: its compiler does not know that buffers are aligned, and would move
each value by itself."""

from __future__ import annotations

import re

import pytest
from tinygrad import Tensor, dtypes
from tinygrad.codegen import to_program

from tests.ops.builders import make_host
from tests.ops.rendering import make_renderer, rendered
from tinyvllm.device.recording import trace_step
from tinyvllm.ops.backend import Epilogue

CODE_LOAD = re.compile(r"uint val\d+ = \(\*\(data")
RESULT_STORE = re.compile(r"^ *\*\(data0_", re.MULTILINE)


@pytest.mark.parametrize("tokens", [1, 512])
def test_codes_and_many_results_move_in_vectors(tokens: int) -> None:
    """`matrix_kernel` is left out: vectors made it slower (its comment has figures)."""
    backend = rendered("CUDA", is_chained=True)
    backend.has_wgmma = True
    matrix, residual = backend.matrix(make_host("Q4_K", 512, 512)), Tensor.empty(tokens * 512, dtype=dtypes.half)
    x = Tensor.empty(tokens * 512, dtype=dtypes.half, device="CPU")
    epilogue = Epilogue(residual=residual)
    traced = trace_step(lambda: backend.whole(backend.linear("test", x, [matrix], tokens, None, epilogue)[0]).realize())
    sources = {
        kernel.arg.name: to_program(kernel, make_renderer("CUDA sm_90")).src[2].arg for kernel, _ in traced.launches
    }
    wanted = ["test_Q4_K"] if tokens == 1 else ["unpack", "test_float16", "sum"]
    assert all(name.startswith(start) for name, start in zip(sources, wanted, strict=True)), list(sources)
    for name, source in sources.items():
        assert not CODE_LOAD.search(source), f"{name} loads words of codes one by one"
        if name.startswith(("unpack", "test_float16")):
            assert not RESULT_STORE.search(source), f"{name} stores its results one by one"
