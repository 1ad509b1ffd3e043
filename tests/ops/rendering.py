"""Steps that are traced but never run: their kernels as source for devices that are not here, and the limits there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from tinygrad import Tensor, UOp, codegen, dtypes
from tinygrad.codegen import to_program
from tinygrad.codegen.opt import tc
from tinygrad.device import Compiler
from tinygrad.dtype import AddrSpace, DType
from tinygrad.helpers import Target
from tinygrad.renderer import Renderer
from tinygrad.renderer.cstyle import CUDARenderer, MetalRenderer, OpenCLRenderer
from tinygrad.uop.ops import Ops, PatternMatcher

from tests.ops.builders import make_host
from tinyvllm.config import KVFormats, LayerKind, Rope
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import PLAIN, Backend, Epilogue, Norm, Step, pool_groups
from tinyvllm.ops.gpu.backend import GpuBackend
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.kernel.lanes import Lanes
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.step_inputs import StepLayout

METAL_BUFFERS = 31  # buffers and variables together
THREADGROUP_BYTES = 32 << 10  # METAL's; tinygrad does not check it for custom kernels
CUDA_THREADGROUP_BYTES = 48 << 10
THREADS = 1024

TARGETS = {
    "METAL": (MetalRenderer, Target("METAL", arch="Apple9"), tc.metal),
    "CUDA sm_80": (CUDARenderer, Target("CUDA", arch="sm_80"), tc.get_cuda("sm_80")),
    "CUDA sm_90": (CUDARenderer, Target("CUDA", arch="sm_90"), tc.get_cuda("sm_90")),
    "OpenCL": (OpenCLRenderer, Target("CL", arch="cl_khr_fp16"), []),
}
KINDS = {"METAL": "METAL", "CUDA": "CUDA sm_80"}  # by TARGETS' names
# the general kernels are the same for every CUDA device, as a test of test_rendering.py says
GENERAL_TARGETS = [target for target in TARGETS if target != "CUDA sm_80"]


@cache
def make_renderer(name: str) -> Renderer:
    """A device's renderer without the device, which its constructor would look for; it compiles nothing."""
    kind, target, tensor_cores = TARGETS[name]
    renderer = kind.__new__(kind)
    Renderer.__init__(renderer, target)
    renderer.tensor_cores, renderer.compiler = tensor_cores, Compiler()
    return renderer


def unwritten(backend: Backend, size: int, dtype: DType = dtypes.float) -> Tensor:
    return Tensor.empty(size, dtype=dtype, device=backend.device.name)


def plan_layer(
    backend: Backend,
    layout: StepLayout,
    formats: tuple[str, str],
    *,
    is_decode: bool,
    verifies: bool = False,
    normed: bool = False,
    samples: bool = True,
    features: tuple[tuple[str, Any], ...] = (),
    epilogue: Epilogue = PLAIN,
) -> list[Tensor]:
    """A small model's step: embedding, one layer, head and sampling. `formats`: of most matrices, and of V and down;
    `samples`: False for the logits alone, since sampling has the same kernels for all backends of GPUs; `features`:
    fields of LayerKind; `epilogue`: of the two products that add to the residual."""
    most, few = formats
    tokens, hidden = layout.num_tokens, 256
    kind = LayerKind(8, 2, 64, Rope(10000.0), head_norm_eps=1e-6 if normed else None)
    kind = replace(kind, **dict(features))
    norm = Norm(unwritten(backend, hidden), 1e-5)
    pool = backend.make_pool(pool_groups([kind]), 5, layout.block_size, "float16")
    step = Step(layout, unwritten(backend, layout.size, dtypes.int), pool, is_decode, verifies=verifies)
    qkv = backend.stacked([make_host(most, 512, hidden), make_host(most, 128, hidden), make_host(few, 128, hidden)], 2)
    (out,) = backend.stacked([make_host(most, hidden, 512)])
    gate_up = backend.gate_up(make_host(most, 256, hidden), make_host(most, 256, hidden))
    (down,) = backend.stacked([make_host(few, hidden, 256)])
    table = backend.matrix(make_host(few, 300, hidden))

    x = backend.embed(table, step)
    parts = backend.linear("qkv", x, qkv, tokens, norm)
    heads = backend.attend(parts, plan_attention_layer(backend, kind, [m.num_rows for m in qkv]), step)
    (x,) = backend.linear("attention_out", heads, [out], tokens, None, replace(epilogue, residual=x))
    (states,) = backend.linear("gate_up", x, [gate_up], tokens, norm, Epilogue(activation="silu"))
    (x,) = backend.linear("down", states, [down], tokens, None, replace(epilogue, residual=x))
    if not is_decode:
        x, tokens = backend.take_rows(x, step, hidden), layout.num_seqs
    (logits,) = backend.linear("lm_head", x, [table], tokens, norm)
    logits = backend.join(logits, table.num_rows, layout)
    if not samples:
        return [logits]
    return [backend.sample(logits, 300, table.num_rows, step.inputs, layout)]


def plan_attention_layer(backend: Backend, kind: LayerKind, qkv_cols: Sequence[int]) -> AttentionLayer:
    """A layer whose tables have no values."""
    cols = kind.q_size + 2 * kind.kv_size
    return AttentionLayer(
        index=0,
        kind=kind,
        qkv_cols=tuple(qkv_cols),
        rope=None if kind.rope is None else unwritten(backend, 1024 * kind.head_dim),
        head_norm=None if kind.head_norm_eps is None else unwritten(backend, 2 * kind.head_dim),
        bias=unwritten(backend, cols) if kind.has_bias else None,
        sinks=unwritten(backend, kind.num_heads) if kind.has_sinks else None,
    )


def plan_attention(backend: Backend, kind: LayerKind, dtype: str, *, is_decode: bool = False) -> list[Tensor]:
    """Attention of a large model's shape. `dtype`: the pool's, or its format, or two: "q8_0/q4_0"."""
    tokens = 4 if is_decode else 16
    layout, cols = StepLayout(tokens, 4, 64, 16), kind.q_size + 2 * kind.kv_size
    pool = backend.make_pool(pool_groups([kind]), 5, 16, KVFormats.of(*dtype.split("/")))
    step = Step(layout, unwritten(backend, layout.size, dtypes.int), pool, is_decode=is_decode)
    qkv = [unwritten(backend, tokens * cols, FLOATS.get(dtype, dtypes.half))]
    return [backend.attend(qkv, plan_attention_layer(backend, kind, [cols]), step)]


def plan_processed(backend: Backend, vocab: int) -> Tensor:
    """Sampling with everything that a request may ask for, of logits whose rows are not padded."""
    layout = StepLayout(4, 4, 2, 16)
    inputs, logits = unwritten(backend, layout.size, dtypes.int), unwritten(backend, 4 * vocab)
    return backend.sample(logits, vocab, vocab, inputs, layout, state=SamplingState(backend.device, 5, vocab))


def kernels_of(outputs: list[Tensor]) -> list[UOp]:
    """What realizing the outputs would launch, each kernel once."""
    calls = Tensor.schedule_linear(*outputs).src
    return list(dict.fromkeys(call.src[0] for call in calls if call.src[0].op is Ops.SINK))


def buffer_bytes(program: UOp, space: AddrSpace) -> int:
    """Bytes of a program's own memory: registers (a CPU's stack) or a threadgroup's."""
    return _bytes_of(program.src[1].src, space)


def written_bytes(kernel: UOp, space: AddrSpace) -> int:
    """`buffer_bytes` of a kernel as it is written. Rendering adds to registers alone, and takes ten times as long."""
    return _bytes_of(kernel.toposort(), space)


def _bytes_of(uops: Iterable[UOp], space: AddrSpace) -> int:
    buffers = [uop for uop in uops if uop.op is Ops.BUFFER and uop.addrspace is space]
    return sum(uop.max_numel() * uop.dtype.itemsize for uop in buffers)


@cache
def reads_context(rules: PatternMatcher) -> bool:
    return any("ctx" in inspect.signature(rule).parameters for _, rule in rules.patterns)


class SharedRewrites:
    """tinygrad's rewriting of one kernel, in which targets share what does not depend on the target: the rules that do
    not read a context, and those that begin with an empty one. Another target takes a third of the first one's time."""

    def __init__(self) -> None:
        self._rewrite = codegen.graph_rewrite
        self._kernel: UOp | None = None
        self._done: dict[tuple[Any, ...], UOp] = {}

    def to_program(self, kernel: UOp, target: str) -> UOp:
        if kernel is not self._kernel:
            self._kernel, self._done = kernel, {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codegen, "graph_rewrite", self._once)
            return to_program(kernel, make_renderer(target))

    def _once(self, sink: UOp, rules: PatternMatcher, ctx: Any = None, **options: Any) -> UOp:
        if ctx != {} and reads_context(rules):
            return self._rewrite(sink, rules, ctx=ctx, **options)
        key = (sink, rules, *((name, value) for name, value in options.items() if name != "name"))
        if key not in self._done:
            self._done[key] = self._rewrite(sink, rules, ctx=ctx, **options)
        return self._done[key]


shared_rewrites = SharedRewrites()


def check_limits(kernel: UOp, *targets: str) -> None:
    for target in targets:
        _check_limits(kernel, target)


def _check_limits(kernel: UOp, target: str) -> None:
    program = shared_rewrites.to_program(kernel, target)
    name, source, info = kernel.arg.name, program.src[2].arg, program.arg
    params = sum(uop.op is Ops.PARAM for uop in program.src[1].src)
    threads = 1
    for size in info.local_size or ():
        threads *= size
    assert params <= METAL_BUFFERS, f"{name} takes {params} buffers"
    assert buffer_bytes(program, AddrSpace.LOCAL) <= threadgroup_bytes(target), f"{name} shares too much"
    assert threads <= THREADS, f"{name} has {threads} threads"
    assert "double" not in source, f"{name} computes in double precision"
    if target.startswith("CUDA"):  # tinygrad includes the header for values of a type, but not for buffers
        for declared, header in (("half", "cuda_fp16.h"), ("nv_bfloat16", "cuda_bf16.h")):
            assert header in source or re.search(rf"\b{declared}\b", source) is None, f"{name} lacks {header}"


def threadgroup_bytes(target: str) -> int:
    """Of memory, at most."""
    return CUDA_THREADGROUP_BYTES if target.startswith("CUDA") else THREADGROUP_BYTES


def gpu_backend(dtype: str) -> Backend:
    """The GPU kind; its tensors have to lie somewhere."""
    return GpuBackend(DeviceHandle("CPU", has_threads=True, is_unified=True), dtype)


def rendered(kind: str, dtype: str = "float16", *, is_chained: bool = False) -> FusedGpuBackend:
    """A backend whose tensors have to lie somewhere, and are never realized."""
    lanes = Lanes(kind, (dtypes.half, dtypes.bfloat16), is_chained)
    return FusedGpuBackend(DeviceHandle("CPU", has_threads=True, is_unified=True), dtype, lanes)
