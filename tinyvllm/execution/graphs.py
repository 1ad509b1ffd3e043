"""One captured TinyJit a bucket: fixed shapes, persistent inputs, nothing compiled while serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import Tensor, TinyJit
from tinygrad.engine.realize import get_call_kernels
from tinygrad.uop.ops import Ops, UOp

from tinyvllm.config import Capacity
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.inputs import InputPacker
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import Backend, KVPool
from tinyvllm.ops.step_inputs import StepLayout


@dataclass
class Graph:
    """A bucket's captured step. `run` enqueues it on what the packer last wrote, and overwrites `output`."""

    bucket: Bucket
    layout: StepLayout
    packer: InputPacker
    send: Callable[[], None]  # moves the packed inputs to the device
    run: Callable[[], Tensor]
    output: Tensor
    num_kernels: int  # that one run launches


def capture(bucket: Bucket, model: Model, backend: Backend, pool: KVPool, capacity: Capacity) -> Graph:
    """Trace, compile and run a bucket's step once, on padding alone: it touches only the dummy block."""
    layout = bucket.layout(capacity)
    inputs, host, send = backend.device.input_buffer(layout.size)
    packer = InputPacker(layout, host)
    send()

    def step() -> Tensor:
        logits = model(layout, inputs, pool, is_decode=bucket.is_decode)
        return backend.sample(logits, model.config.vocab_size, model.logit_stride, inputs, layout).realize()

    jit = TinyJit(step)
    jit.cnt = 1  # the first call captures: TinyJit's plain call 0 would schedule everything twice
    output = jit()
    backend.device.wait()
    return Graph(bucket, layout, packer, send, jit, output, count_kernels(jit.captured.linear))


def count_kernels(linear: UOp) -> int:
    """Kernels of a captured step. tinygrad's own counters take a whole graph for one."""
    return sum(_kernels_of(call) for call in linear.src)


def _kernels_of(call: UOp) -> int:
    target = call.src[0]
    if target.op is Ops.CUSTOM_FUNCTION and target.arg == "graph":
        return len(target.src[0].src)
    return len(get_call_kernels(call))  # of the CPU's submitter, which runs many, or of a call that stands alone
