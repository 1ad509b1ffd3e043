"""One captured TinyJit a bucket: fixed shapes, persistent inputs, nothing compiled while serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import Tensor, TinyJit

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
    return Graph(bucket, layout, packer, send, jit, output)
