"""A kernel for tests of the code that compiles, records and replays kernels."""

from __future__ import annotations

from tinygrad import UOp

from tinyvllm.ops.kernel.body import Body, KernelFn, cached_kernel, finish


@cached_kernel
def add_one_kernel(size: int) -> KernelFn:
    """fn(out, x): x + 1."""

    def kernel(out: UOp, x: UOp) -> UOp:
        i = Body().loop(size)
        return finish(out[i].store(x[i].load() + 1.0).end(i), f"add_one_{size}")

    return kernel
