"""What the steps of well-known models launch and move, and how long that takes by prediction, for devices that need
not be here. The counts are kept in data/step_counts.json, so that a change of them is seen and meant:
python -m tests.families.step_counts

writes the file anew. Steps are traced with three layers of the full size, whose weights are shapes, and stretched to
all layers. A kernel moves each of its arguments once and whole, except keys and values, tables of positions and of
embeddings, of which a step reads a part that depends on its sequences: those are not counted. A kernel's time is that
of cost.py if its spec has a prediction, and otherwise that of its bytes or of its operations, whichever is longer,
plus a launch's, by the factors of `tinyvllm profile --predict`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import tinyvllm.ops  # noqa: F401  (before tinygrad)

# isort: split

from tinygrad import Tensor, UOp, dtypes
from tinygrad.device import Buffer
from tinygrad.uop.ops import Ops

from tests.metal.limits import ShapeWeights, without_weights
from tests.ops.rendering import rendered, unwritten
from tinyvllm.bench.shapes import find_shape
from tinyvllm.device.handle import open_device
from tinyvllm.device.recording import trace_step
from tinyvllm.model.registry import Model, make_model
from tinyvllm.ops.backend import Step, pool_groups
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.profiling.chips import CHIPS, Chip
from tinyvllm.profiling.predict import EPYC, FACTORS

PATH = Path(__file__).parent / "data" / "step_counts.json"
LAYERS = 3  # that are traced: the first, one in the middle, which is repeated, the last
CHIP_OF = {"CUDA sm_90": CHIPS["h200"], "METAL": CHIPS["m4-pro"], "CPU": EPYC}
BUCKETS = {"decode 1": 1, "decode 8": 8, "decode 64": 64, "verify 5": 5, "prefill 1024": 1024}  # their tokens
SHAPES = {"CUDA sm_90": ("llama-3.1-8b", "llama-3.2-1b"), "METAL": ("llama-3.1-8b",), "CPU": ("llama-3.2-1b",)}
CASES = [(target, shape, kind) for target, shapes in SHAPES.items() for shape in shapes for kind in ("float16", "Q4_K")]
BLOCK_SIZE, NUM_BLOCKS, NUM_POSITIONS = 16, 513, 1024
TOLERANCE = 0.005  # of predicted times, which are rounded


@dataclass(frozen=True)
class Counts:
    """Of one step."""

    kernels: int
    moved_mb: float
    predicted_us: float

    def as_json(self) -> dict[str, float]:
        return {"kernels": self.kernels, "moved_mb": self.moved_mb, "predicted_us": self.predicted_us}


@dataclass(frozen=True)
class _Launch:
    name: str
    nbytes: int
    seconds: float


def count_steps(target: str, shape: str, kind: str, buckets: Iterable[str] = BUCKETS) -> dict[str, Counts]:
    """The counts of a model's steps on a device, by name."""
    config = find_shape(shape)
    backend = without_weights(_backend(target))
    few = replace(config, num_layers=LAYERS, dtype="float16")
    model = make_model(few, ShapeWeights(kind), backend, NUM_POSITIONS, lambda done, total: None)
    return {
        f"{target} {shape} {kind} {bucket}": _stretched([*_launches(target, model, backend, bucket)], config.num_layers)
        for bucket in buckets
    }


def _backend(target: str) -> Any:
    if target == "CPU":
        return CpuBackend(open_device(), None, x_bits=16)
    backend = rendered(target.split()[0], is_chained=target == "CUDA sm_90")
    backend.has_wgmma = target == "CUDA sm_90"
    return backend


def _launches(target: str, model: Model, backend: Any, bucket: str) -> Iterator[_Launch]:
    """The launches of a step, in order."""
    from tinyvllm.ops.gpu import attention_prefill

    groups, tokens, kind = pool_groups(model.config.layers), BUCKETS[bucket], bucket.split()[0]
    layout = StepLayout(tokens, 8 if kind == "prefill" else tokens, 64, BLOCK_SIZE, num_groups=len(groups))
    pool = backend.make_pool(groups, NUM_BLOCKS, BLOCK_SIZE, "float16")
    inputs = unwritten(backend, layout.size, dtypes.int)
    step = Step(layout, inputs, pool, kind == "decode", verifies=kind == "verify")

    def run() -> Tensor:
        logits = model(step)
        return backend.sample(logits, model.config.vocab_size, model.logit_stride, inputs, layout).realize()

    is_hopper = target == "CUDA sm_90"
    with (
        mock.patch.object(attention_prefill, "has_wgmma", lambda device: is_hopper),
        tuning.current.watching() as asked,
    ):
        launches = trace_step(run, shares_rows=target != "CPU").launches  # there attention is one of many rows too
    looked_up = _bases([inputs, *pool.tensors, *model.embedding.planes, *model.ropes])
    predictions = {_kernel_name(spec): spec.predicted_s for spec in asked.values()}
    for sink, buffers in launches:
        name = sink.arg.name if sink.op is Ops.SINK else str(sink.op)
        left_out = set() if name.startswith("lm_head") else looked_up  # the head may share its table's planes
        own = {id(buffer.base): buffer for buffer in buffers if id(buffer.base) not in left_out}
        nbytes = sum(buffer.nbytes for buffer in own.values())
        yield _Launch(name, nbytes, predictions.get(name) or _seconds(sink, nbytes, CHIP_OF[target]))


def _kernel_name(spec: Any) -> str:
    """The name of a product's kernel; any other text for other kernels."""
    sizes = [getattr(spec, name, 0) for name in ("num_tokens", "num_rows", "num_cols")]
    kind = getattr(getattr(spec, "format", None), "name", "")
    return f"{getattr(spec, 'name', '')}_{kind}_{max(1, sizes[0])}x{sizes[1]}x{sizes[2]}"


def _bases(tensors: list[Tensor]) -> set[int]:
    """The identities of tensors' memory."""
    buffers = [tensor.uop.base.buffer for tensor in tensors]
    return {id(buffer.base) for buffer in buffers if isinstance(buffer, Buffer)}


def _seconds(sink: UOp, nbytes: int, chip: Chip) -> float:
    """A kernel's time by its counts alone."""
    factors = FACTORS[chip.device]
    estimates = getattr(sink.arg, "estimates", None)
    flops = float(estimates.ops) if estimates is not None and isinstance(estimates.ops, int | float) else 0.0
    memory_s = nbytes / (chip.bandwidth_gbps * 1e9 * factors.bandwidth_share)
    return max(memory_s, flops / (chip.half_tflops * 1e12 * factors.prompt_share)) + factors.kernel_us * 1e-6


def _stretched(launches: list[_Launch], num_layers: int) -> Counts:
    """The counts of all layers: those from one gate_up to the next are repeated."""
    first, second = [i for i, launch in enumerate(launches) if launch.name.startswith("gate_up")][-2:]
    whole = [*launches, *launches[first:second] * (num_layers - LAYERS)]
    return Counts(
        kernels=len(whole),
        moved_mb=round(sum(launch.nbytes for launch in whole) / 1e6, 1),
        predicted_us=round(sum(launch.seconds for launch in whole) * 1e6, 1),
    )


def read() -> dict[str, Counts]:
    """The counts that are kept."""
    return {name: Counts(**entry) for name, entry in json.loads(PATH.read_text(encoding="utf-8")).items()}


def differences(before: Mapping[str, Counts], after: Mapping[str, Counts]) -> list[str]:
    """What changed, in words."""
    said = []
    for name, new in after.items():
        old = before.get(name)
        if old is None:
            said.append(f"{name} is not in the file")
            continue
        changes = [
            f"{label} {was:,} -> {now:,} ({now / was - 1:+.1%})"
            for label, was, now, tolerance in (
                ("kernels", old.kernels, new.kernels, 0.0),
                ("MB moved", old.moved_mb, new.moved_mb, 0.0),
                ("predicted us", old.predicted_us, new.predicted_us, TOLERANCE),
            )
            if abs(now - was) > tolerance * was
        ]
        if changes:
            said.append(f"{name}: {', '.join(changes)}")
    return said


def main() -> int:
    found = {name: counts for case in CASES for name, counts in count_steps(*case).items()}
    print(*(differences(read(), found) if PATH.exists() else ["a new file"]), sep="\n")
    lines = [f" {json.dumps(name)}: {json.dumps(counts.as_json())}" for name, counts in found.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
