"""Which programs a step launches, how often, and a hash of their source, for devices that need not be here:
python scripts/graph_inventory.py before.json; ...; python scripts/graph_inventory.py after.json --against before.json

Two small models with random weights are traced on every kind of device and rendered for it: the proof that a change of
structure left the graphs alone. Ends with status 1 where anything differs.
"""

# mypy: ignore-errors
# (it also runs in checkouts of earlier commits, whose modules have other names)

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("DEV", "CPU")
sys.path.insert(0, os.getcwd())  # the checkout that this is run in, and its tests/

import tinyvllm.model  # noqa: F401  (before tinygrad)
from tests.ops.rendering import gpu_backend, rendered
from tinyvllm.bench.shapes import find_shape
from tinyvllm.config import ModelConfig

import dataclasses  # isort: skip

BUCKETS = ((1, True), (4, True), (32, True), (16, False), (96, False), (1024, False))
KINDS = ("float16", "Q4_0", "Q4_K", "Q8_0")
TARGETS = ("CPU", "METAL", "CUDA sm_80", "CUDA sm_90", "OpenCL")


def small(name: str) -> ModelConfig:
    """A well-known model's layer, narrower, twice."""
    shape = find_shape(name)
    size = {"hidden_size": 512, "ffn_size": 1536, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 1000}
    return dataclasses.replace(shape, num_layers=2, **size)


def backend_for(target: str) -> Any:
    if target == "CPU":
        try:
            from tinyvllm.device.handle import open_device
            from tinyvllm.ops.cpu.backend import CpuBackend
        except ModuleNotFoundError:
            from tinyvllm.ops.cpu import CpuBackend
            from tinyvllm.ops.device import open_device
        return CpuBackend(open_device(), None)
    if target == "OpenCL":
        return gpu_backend("float16")
    kind = target.split()[0]
    backend = rendered(kind, is_chained=target == "CUDA sm_90")
    backend.has_wgmma = backend.has_wide = target == "CUDA sm_90"
    return backend


def programs(target: str, model: Any, backend: Any, tokens: int, is_decode: bool) -> Iterator[tuple[str, str]]:
    """(name, hash of the source) of each launch of a step, in order."""
    try:
        from tinyvllm.device.recording import trace_step
        from tinyvllm.ops.step_inputs import StepLayout
    except ModuleNotFoundError:
        from tinyvllm.ops.recording import trace_step
        from tinyvllm.ops.step_inputs import StepLayout
    from tinygrad import Tensor, dtypes
    from tinygrad.uop.ops import Ops

    groups = [len(model.pool_groups)] if hasattr(model, "pool_groups") else []  # older checkouts have one
    layout = StepLayout(tokens, tokens if is_decode else 8, 64, 16, *groups)
    inputs = backend.device.zeros(layout.size, dtypes.int)
    config = model.config
    pool = POOLS.make(backend, model)
    newest = backend.device.zeros(64 * 64, dtypes.int)

    def trace() -> Tensor:
        logits = run_model(model, layout, inputs, pool, is_decode, newest)
        return backend.sample(logits, config.vocab_size, model.logit_stride, inputs, layout).realize()

    for sink, _ in trace_step(trace).launches:
        if sink.op is not Ops.SINK:
            yield str(sink.op), ""
            continue
        yield getattr(sink.arg, "name", "?"), sink.key.hex()[:12]


class POOLS:
    """What differs between checkouts."""

    @staticmethod
    def make(backend: Any, model: Any) -> Any:
        if not hasattr(model, "shape"):
            from tinyvllm.ops.backend import pool_groups

            return backend.make_pool(pool_groups(model.config.layers), 64 * 8 + 1, 16, "float16")
        return backend.make_pool(model.config.num_layers, 64 * 8 + 1, 16, model.shape, "float16")


def run_model(model: Any, layout: Any, inputs: Any, pool: Any, is_decode: bool, newest: Any) -> Any:
    try:
        from tinyvllm.ops.backend import Step
    except ImportError:
        return model(layout, inputs, pool, is_decode=is_decode, newest=newest)
    return model(Step(layout, inputs, pool, is_decode, newest))


def take_inventory() -> dict[str, dict[str, list[Any]]]:
    from tinyvllm.model.registry import make_model
    from tinyvllm.model.weights.random import RandomWeights

    found: dict[str, dict[str, list[Any]]] = {}
    for target in TARGETS:
        for shape, kind in [("llama-3.2-1b", kind) for kind in KINDS] + [("qwen3-0.6b", "float16")]:
            backend = backend_for(target)
            model = make_model(small(shape), RandomWeights(kind, 0), backend, 1024, lambda done, total: None)
            for tokens, is_decode in BUCKETS:
                with mark_wgmma(target):
                    launches = list(programs(target, model, backend, tokens, is_decode))
                name = f"{target} {shape} {kind} {'decode' if is_decode else 'prefill'} {tokens}"
                found[name] = {f"{program} {digest}": [count] for (program, digest), count in Counter(launches).items()}
                found[name]["order"] = [hashlib.sha256(repr(launches).encode()).hexdigest()[:12]]
                print(f"{name}: {len(launches)} kernels, {len(found[name]) - 1} programs", flush=True)
    return found


def mark_wgmma(target: str) -> Any:
    """Hopper's instructions are looked up by the device's name, which here is the CPU's."""
    try:
        from tinyvllm.ops.gpu import attention_prefill as module
    except (ImportError, ModuleNotFoundError):
        from tinyvllm.ops import gpu_prefill as module
    name = "is_wide" if hasattr(module, "is_wide") else "has_wgmma"
    return mock.patch.object(module, name, lambda device: target == "CUDA sm_90")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    flags = parser.parse_args()
    found = take_inventory()
    flags.out.write_text(json.dumps(found, indent=1))
    if flags.against is None:
        return 0
    before = json.loads(flags.against.read_text(encoding="utf-8"))
    wrong = [name for name in before if before[name] != found.get(name)]
    for name in wrong:
        old, new = before[name], found.get(name, {})
        print(f"{name}:", *[f"- {key} {value}" for key, value in old.items() if new.get(key) != value][:6], sep="\n  ")
        print(*[f"  + {key} {value}" for key, value in new.items() if old.get(key) != value][:6], sep="\n")
    print(f"{len(before)} graphs compared, {len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
