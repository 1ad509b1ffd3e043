"""Steps that are traced but never run: their kernels as source for devices that are not here, and the limits there."""

from __future__ import annotations

from functools import cache

from tinygrad import Tensor, UOp, dtypes
from tinygrad.codegen import to_program
from tinygrad.codegen.opt import tc
from tinygrad.device import Compiler
from tinygrad.dtype import AddrSpace, DType
from tinygrad.helpers import Target
from tinygrad.renderer import Renderer
from tinygrad.renderer.cstyle import CUDARenderer, MetalRenderer, OpenCLRenderer
from tinygrad.uop.ops import Ops

from tests.ops.builders import make_host
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.ops.backend import AttentionShape, Backend, Norm
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
    backend: Backend, layout: StepLayout, formats: tuple[str, str], *, is_decode: bool, normed: bool = False
) -> list[Tensor]:
    """A small model's step: embedding, one layer, head and sampling. `formats`: of most matrices, and of V and down."""
    most, few = formats
    tokens, hidden, shape = layout.num_tokens, 256, AttentionShape(8, 2, 64)
    inputs, rope = unwritten(backend, layout.size, dtypes.int), unwritten(backend, 64 * 64)
    norm = Norm(unwritten(backend, hidden), 1e-5)
    pool = backend.make_pool(1, 5, layout.block_size, shape, "float16")
    qkv = backend.stacked([make_host(most, 512, hidden), make_host(most, 128, hidden), make_host(few, 128, hidden)])
    (out,) = backend.stacked([make_host(most, hidden, 512)])
    gate_up = backend.gate_up(make_host(most, 256, hidden), make_host(most, 256, hidden))
    (down,) = backend.stacked([make_host(few, hidden, 256)])
    table = backend.matrix(make_host(few, 300, hidden))

    x = backend.embed(table, inputs, layout)
    parts = backend.norm_linear("qkv", x, norm, qkv, tokens)
    widths = [matrix.num_rows for matrix in qkv]
    head_norm = Norm(unwritten(backend, 2 * shape.head_dim), 1e-6) if normed else None
    step = (pool, 0, inputs, rope, layout)
    heads = backend.attend(parts, widths, shape, *step, is_decode=is_decode, head_norm=head_norm)
    x = backend.linear_add("attention_out", heads, out, x, tokens)
    hidden_states = backend.norm_gated("gate_up", x, norm, gate_up, tokens)
    x = backend.linear_add("down", hidden_states, down, x, tokens)
    if not is_decode:
        x, tokens = backend.take_rows(x, inputs, layout, hidden), layout.num_seqs
    (logits,) = backend.norm_linear("lm_head", x, norm, [table], tokens)
    logits = backend.join(logits, table.num_rows, layout)
    return [backend.sample(logits, 300, table.num_rows, inputs, layout)]


def plan_attention(backend: Backend, shape: AttentionShape, dtype: str) -> list[Tensor]:
    """Attention of a large model's shape."""
    layout = StepLayout(16, 4, 64, 16)
    widths = ((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim,)
    inputs, rope = unwritten(backend, layout.size, dtypes.int), unwritten(backend, 1024 * shape.head_dim)
    pool = backend.make_pool(1, 5, 16, shape, dtype)
    qkv = [unwritten(backend, 16 * widths[0], FLOATS[dtype])]
    return [backend.attend(qkv, widths, shape, pool, 0, inputs, rope, layout, is_decode=False)]


def plan_processed(backend: Backend, vocab: int) -> Tensor:
    """Sampling with everything that a request may ask for, of logits whose rows are not padded."""
    layout = StepLayout(4, 4, 2, 16)
    inputs, logits = unwritten(backend, layout.size, dtypes.int), unwritten(backend, 4 * vocab)
    return backend.sample(logits, vocab, vocab, inputs, layout, state=SamplingState(backend.device, 5, vocab))


def kernels_of(outputs: list[Tensor]) -> list[UOp]:
    """What realising the outputs would launch, each kernel once."""
    calls = Tensor.schedule_linear(*outputs).src
    return list(dict.fromkeys(call.src[0] for call in calls if call.src[0].op is Ops.SINK))


def buffer_bytes(program: UOp, space: AddrSpace) -> int:
    """Bytes of a program's own memory: registers (a CPU's stack) or a threadgroup's."""
    buffers = [uop for uop in program.src[1].src if uop.op is Ops.BUFFER and uop.addrspace is space]
    return sum(uop.max_numel() * uop.dtype.itemsize for uop in buffers)


def check_limits(kernel: UOp, target: str) -> None:
    program = to_program(kernel, make_renderer(target))
    name, source, info = kernel.arg.name, program.src[2].arg, program.arg
    params = sum(uop.op is Ops.PARAM for uop in program.src[1].src)
    threads = 1
    for size in info.local_size or ():
        threads *= size
    assert params <= METAL_BUFFERS, f"{name} takes {params} buffers"
    limit = CUDA_THREADGROUP_BYTES if target.startswith("CUDA") else THREADGROUP_BYTES
    assert buffer_bytes(program, AddrSpace.LOCAL) <= limit, f"{name} shares too much"
    assert threads <= THREADS, f"{name} has {threads} threads"
    assert "double" not in source, f"{name} computes in double precision"


def gpu_backend(dtype: str) -> Backend:
    """The GPU kind; its tensors have to lie somewhere."""
    return GpuBackend(DeviceHandle("CPU", has_threads=True, is_unified=True), dtype)


def rendered(kind: str, dtype: str = "float16", *, is_chained: bool = False) -> FusedGpuBackend:
    """A backend whose tensors have to lie somewhere, and are never realised."""
    lanes = Lanes(kind, (dtypes.half, dtypes.bfloat16), is_chained)
    return FusedGpuBackend(DeviceHandle("CPU", has_threads=True, is_unified=True), dtype, lanes)
