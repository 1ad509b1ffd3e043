"""Rewriting in less time gives the programs that tinygrad's own rewriting gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.codegen import do_to_program
from tinygrad.device import Compiler
from tinygrad.helpers import Context
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import Ops, PatternMatcher, UPat, graph_rewrite

from tests.ops.rendering import gpu_backend, kernels_of, make_renderer, plan_layer
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.rewriting import PLACES, TINYGRADS, rewrite_faster
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.step_inputs import StepLayout


@contextmanager
def tinygrads_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for (owner, name), function in zip(PLACES, TINYGRADS, strict=True):
            patch.setattr(owner, name, function)
        yield


def cpu_renderer() -> Renderer:
    """The CPU's, which compiles nothing."""
    renderer = copy.copy(Device["CPU"].renderer)
    renderer.compiler = Compiler()
    return renderer


def sources_of(kernels: list[UOp], renderer: Renderer) -> list[str]:
    return [do_to_program(kernel, renderer).src[2].arg for kernel in kernels]


def check(kernels: list[UOp], renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite_faster()
    ours = sources_of(kernels, renderer)
    with tinygrads_own(monkeypatch):
        assert sources_of(kernels, renderer) == ours
    assert len(ours) > 1


def step_kernels(backend: Backend, formats: tuple[str, str], *, is_decode: bool) -> list[UOp]:
    layout = StepLayout(2, 2, 2, 16) if is_decode else StepLayout(64, 3, 2, 16)
    return kernels_of(plan_layer(backend, layout, formats, is_decode=is_decode, samples=False))


@pytest.mark.parametrize("is_decode", (True, False), ids=["decode", "mixed"])
@pytest.mark.parametrize("formats", (("Q4_K", "Q6_K"), ("float16", "float16")), ids=str)
def test_a_step_on_a_cpu(
    device: DeviceHandle, formats: tuple[str, str], is_decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CpuBackend(device, None)
    check(step_kernels(backend, formats, is_decode=is_decode), cpu_renderer(), monkeypatch)


@pytest.mark.parametrize("target", ("METAL", "CUDA sm_90"))
def test_a_step_on_a_gpu(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = step_kernels(gpu_backend("float16"), ("Q4_K", "float16"), is_decode=True)
    check(kernels, make_renderer(target), monkeypatch)


def test_kernels_of_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = Tensor.empty(24, 40), Tensor.empty(40, 16)
    index = Tensor.empty(7, dtype=dtypes.int)
    outputs = [(x @ y).softmax(), x[index].sum(0), x.max(1).exp(), x.flip(0).pad(((1, 2), (0, 0))).cumsum(0)]
    check(kernels_of(outputs), cpu_renderer(), monkeypatch)


def test_a_run_of_a_buffer_is_inside_if_it_may_be() -> None:
    rewrite_faster()
    buffer, start = UOp.placeholder((8,), dtypes.float, 0), UOp.variable("n", 0, 9)

    def shape_from(first: UOp, count: int) -> object:
        return UOp(Ops.SHRINK, src=(buffer, first, UOp.const(count))).shape

    assert shape_from(start, 4) == (4,) and shape_from(UOp.const(4), 4) == (4,)
    for first, count in ((UOp.const(5), 4), (UOp.const(-1), 4), (start, 9), (start + 5, 4)):
        with pytest.raises(ValueError, match="invalid shrink"):
            shape_from(first, count)


def test_rules_that_undo_each_other_are_refused() -> None:
    rewrite_faster()
    rules = PatternMatcher(
        [
            (UPat(Ops.ADD, name="x"), lambda x: x.replace(op=Ops.MUL)),
            (UPat(Ops.MUL, name="x"), lambda x: x.replace(op=Ops.ADD)),
        ]
    )
    with Context(REWRITE_STACK_LIMIT=1000), pytest.raises(RuntimeError, match="infinite loop"):
        graph_rewrite(UOp.variable("n", 1, 9) + 3, rules)
