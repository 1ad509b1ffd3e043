"""Every kernel as source for devices that are not here: it renders, and keeps to the device's limits.

A backend is asked for a step on tensors that are never realized; what it would launch is rendered for each device. By
default some steps are left out: python -m pytest -m "sweep and not gpu" tests/ops
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from tinygrad import Device, dtypes
from tinygrad.codegen import to_program
from tinygrad.dtype import AddrSpace

from tests import sweeps
from tests.ops.builders import make_host
from tests.ops.experts import Case, make_kind, make_layer
from tests.ops.rendering import (
    GENERAL_TARGETS,
    buffer_bytes,
    check_limits,
    gpu_backend,
    kernels_of,
    make_renderer,
    plan_attention,
    plan_layer,
    plan_processed,
    unwritten,
)
from tests.sweeps import swept
from tinyvllm.config import LayerKind, Rope
from tinyvllm.device.handle import KERNEL_STACK_BYTES, DeviceHandle
from tinyvllm.ops.backend import Epilogue, Norm
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.step_inputs import StepLayout

# -- the GPU kind ---------------------------------------------------------------------------------------------------


def on_targets(default: str) -> Callable[[Any], Any]:
    """The targets of a test: by default one, since others spell the same kernels, and tests/metal runs METAL's."""
    cases = [((default,),), (tuple(GENERAL_TARGETS),)]
    return pytest.mark.parametrize("targets", swept(cases, cases[:1]), ids=[default, "every target"])


@on_targets("OpenCL")
@pytest.mark.parametrize("is_decode", swept((True, False), [False]), ids=["decode", "mixed"])
def test_a_step_renders_within_the_limits(is_decode: bool, targets: tuple[str, ...]) -> None:
    layout = StepLayout(4, 4, 2, 16) if is_decode else StepLayout(16, 3, 2, 16)
    backend, mixed = gpu_backend("float16"), not is_decode
    outputs = plan_layer(backend, layout, ("Q4_K", "Q6_K"), is_decode=is_decode, samples=False, normed=mixed)
    kernels = kernels_of(outputs)
    names = {kernel.arg.name.split("_")[0] for kernel in kernels}
    assert names >= {"embed", "write", "attention"}
    for kernel in kernels:
        check_limits(kernel, *targets)


WAYS = [("Q5_1", "Q8_0"), ("bfloat16", "bfloat16"), ("Q4_0", "Q5_0")]  # to store most matrices, and V and down


@pytest.mark.parametrize("formats", swept([(way,) for way in WAYS], []), ids=str)
def test_every_way_to_store_weights_renders(formats: tuple[str, str]) -> None:
    backend, layout = gpu_backend("bfloat16" if formats[0] == "bfloat16" else "float16"), StepLayout(2, 2, 2, 16)
    for kernel in kernels_of(plan_layer(backend, layout, formats, is_decode=True, samples=False)):
        check_limits(kernel, *GENERAL_TARGETS)


@on_targets("CUDA sm_90")
def test_general_experts_render_within_the_limits(targets: tuple[str, ...]) -> None:
    """Of one row and of several, with groups, biases and a shared expert's weight."""
    kind = make_kind(8, 2, score="sigmoid", num_groups=4, top_groups=2, has_choice_bias=True, has_expert_scale=True)
    kind, backend = replace(kind, has_biases=True, has_shared_gate=True), gpu_backend("float16")
    layer = make_layer(backend, Case(kind, "MXFP4-e8m0"))
    norm = Norm(unwritten(backend, 256), 1e-5)
    for tokens in (1, 3):
        x = unwritten(backend, tokens * 256, dtypes.half)
        routing = backend.route(x, layer, tokens, norm)
        assert routing.shared is not None
        out = backend.experts(x, routing, layer, tokens, norm, Epilogue(post_norm=norm, residual=x))
        for kernel in kernels_of([backend.scale_rows(out, routing.shared, tokens)]):
            check_limits(kernel, *targets)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    swept(
        product([(64, 8, 128), (16, 8, 256), (9, 3, 64)], ("float16", "bfloat16")),
        [((9, 3, 64), "bfloat16")],
    ),
    ids=str,
)
def test_attention_of_large_models_renders_within_the_limits(heads: tuple[int, int, int], dtype: str) -> None:
    for kernel in kernels_of(plan_attention(gpu_backend(dtype), LayerKind(*heads, Rope(10000.0)), dtype)):
        check_limits(kernel, *GENERAL_TARGETS)


@pytest.mark.sweep  # by default tests/metal runs it, and the test below renders the same passes with more
def test_sampling_renders_within_the_limits() -> None:
    layout = StepLayout(16, 3, 2, 16)
    kernels = kernels_of(plan_layer(gpu_backend("float16"), layout, ("float16", "float16"), is_decode=False))
    sampling = [kernel for kernel in kernels if kernel.arg.name.split("_")[0] in ("leaders", "draw")]
    assert len(sampling) == 2
    for kernel in sampling:
        check_limits(kernel, *GENERAL_TARGETS)


@on_targets("METAL")
@pytest.mark.parametrize("vocab", swept((300, 49152), [300]))
def test_a_step_with_logits_processing_renders_within_the_limits(vocab: int, targets: tuple[str, ...]) -> None:
    """One vocabulary is not a multiple of a mask's word."""
    kernels = kernels_of([plan_processed(gpu_backend("float16"), vocab)])
    names = [kernel.arg.name.split("_")[0] for kernel in kernels]
    assert names == ["logprobs", "process", "bias", "typical", "leaders", "draw", "count"]
    for kernel, name in zip(kernels, names, strict=True):
        if name not in ("leaders", "draw") or sweeps.is_sweeping:  # which tests/metal runs
            check_limits(kernel, *targets)


def test_hidden_states_are_stored_one_by_one() -> None:
    """A kernel that stores a value of each thread, whatever the shape of what it reads."""
    backend = gpu_backend("float16")
    norm = Norm(unwritten(backend, 96), 1e-6)
    stored = backend.store_normed(unwritten(backend, 3 * 96), norm, 3, unwritten(backend, 1024), 96, 192)
    (kernel,) = [kernel for kernel in kernels_of([stored]) if kernel.arg.name.startswith("store_rows")]
    check_limits(kernel, *GENERAL_TARGETS)
    for target in GENERAL_TARGETS:
        source = to_program(kernel, make_renderer(target)).src[2].arg
        assert source.count("(data0_1024+") == 1, source


@pytest.mark.sweep
def test_cuda_devices_are_given_the_same_general_kernels() -> None:
    formats = ("float16", "Q8_0")
    layout = StepLayout(2, 2, 2, 16)
    for kernel in kernels_of(plan_layer(gpu_backend("float16"), layout, formats, is_decode=True, samples=False)):
        older, newer = (to_program(kernel, make_renderer(f"CUDA {arch}")).src[2].arg for arch in ("sm_80", "sm_90"))
        assert older == newer, kernel.arg.name


# -- the CPU kind ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_decode", swept((True, False), [False]), ids=["decode", "mixed"])
def test_cpu_kernels_use_neither_threads_nor_double_precision(is_decode: bool) -> None:
    layout = StepLayout(1, 1, 2, 16) if is_decode else StepLayout(16, 3, 2, 16)
    backend = CpuBackend(DeviceHandle("CPU", has_threads=False, is_unified=True), None)
    outputs = plan_layer(backend, layout, ("Q4_1", "Q8_0"), is_decode=is_decode, samples=sweeps.is_sweeping)
    for kernel in kernels_of(outputs):
        program = to_program(kernel, Device["CPU"].renderer)
        assert "double" not in program.src[2].arg, kernel.arg.name
        assert buffer_bytes(program, AddrSpace.LOCAL) == 0, kernel.arg.name


@pytest.mark.parametrize("vocab", swept((300, 49152), []))  # tests/ops/sampling runs them
def test_cpu_kernels_of_a_step_with_logits_processing_use_neither_threads_nor_double_precision(vocab: int) -> None:
    backend = CpuBackend(DeviceHandle("CPU", has_threads=False, is_unified=True), None)
    for kernel in kernels_of([plan_processed(backend, vocab)]):
        program = to_program(kernel, Device["CPU"].renderer)
        assert "double" not in program.src[2].arg, kernel.arg.name
        assert buffer_bytes(program, AddrSpace.LOCAL) == 0, kernel.arg.name


@pytest.mark.parametrize("tokens", swept((1, 4, 16, 256), [256]))
def test_the_stack_holds_a_large_models_tiles(tokens: int) -> None:
    """Llama 3.1 70B's down projection is 28672 wide. The matrix stays virtual: what counts is its shape."""
    backend = CpuBackend(DeviceHandle("CPU", has_threads=False, is_unified=True), None)
    narrow = backend.matrix(make_host("Q4_K", 32, 256))
    planes = tuple(unwritten(backend, plane.numel() * 28672 // 256, plane.dtype) for plane in narrow.planes)
    wide = Matrix(narrow.format, 32, 28672, 32, "panel", planes)
    norm = Norm(unwritten(backend, 28672), 1e-5)
    x = unwritten(backend, tokens * 28672)
    for kernel in kernels_of(backend.linear("wide", x, [wide], tokens, norm)):
        program = to_program(kernel, Device["CPU"].renderer)
        assert buffer_bytes(program, AddrSpace.REG) < KERNEL_STACK_BYTES // 8, kernel.arg.name
