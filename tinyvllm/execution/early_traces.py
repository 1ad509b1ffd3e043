"""Tracing the first graphs and compiling their kernels while the weights are being loaded.

What a step launches depends on the shapes and formats of the weights, not on their values. So other processes place the
model on a device without memory, where the layers that are alike share what is costly, and trace the first buckets'
steps as `tracing.py` does later. A trace is taken if its step has the name of the one that this process would trace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from tinygrad import dtypes
from tinygrad.helpers import Context
from tinygrad.renderer import Renderer

from tinyvllm.arrays import QuantizedMatrix
from tinyvllm.device import meta
from tinyvllm.device.compiling import (
    Compiler,
    Key,
    PackedKernel,
    Pending,
    begin_elsewhere,
    can_trace_elsewhere,
    key_of,
    num_workers,
    settings,
)
from tinyvllm.device.host_memory import available_bytes
from tinyvllm.device.program_store import ProgramStore
from tinyvllm.device.recording import TracedStep, trace_step
from tinyvllm.execution.buckets import Bucket, first_buckets
from tinyvllm.execution.early_start import MANY_LAYERS
from tinyvllm.execution.setting import Setting, place
from tinyvllm.execution.step_code import GraphContext, StepCode
from tinyvllm.execution.tracing import EarlyTrace, TracedElsewhere, code_of, renderers_of, trace_both
from tinyvllm.faults import reach
from tinyvllm.model.weights.checkpoint import WeightSource
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.sampling.sample import OUT_WIDTH

logger = logging.getLogger(__name__)

MANY_WORKERS = 8  # from which on parts of a step are traced besides the whole step
# Host memory of a quantized weight while it is packed, at most of Q4_0 to Q8_0: a byte for its code, and what packing
# copies; of a matrix alone 1.7 to 2.1, of those that are stacked 2.9 to 3.3
ALONE_BYTES, STACKED_BYTES = 2.2, 3.4
FEW_LAYERS = 2  # the first ones, besides the last one

Reopen = Callable[[], WeightSource]


class EarlyTraces:
    """Owns the traces that were begun before the weights were loaded, and the compiler of their kernels."""

    def __init__(self, traces: Mapping[Bucket, EarlyTrace], parts: Sequence[Pending], compiler: Compiler) -> None:
        """parts: kernels that parts of the steps launch, which are known before their traces."""
        self.traces = dict(traces)
        self.compiler = compiler
        self._traced, self._parts = list(self.traces.values()), list(parts)

    def advance(self) -> None:
        """Begin to compile what was traced meanwhile."""
        for part in [one for one in self._parts if one.is_done]:
            self._parts.remove(part)
            self.compiler.begin_packed(part.wait() or {}, 0)
        for trace in [one for one in self._traced if one.is_done]:
            self._traced.remove(trace)
            if (traced := trace.wait()) is not None:
                self.compiler.begin_packed(traced.kernels, 0)

    def withdraw(self) -> None:
        """Drop the parts, once the whole steps are traced: processes that have begun some finish them in vain."""
        for part in self._parts:
            part.withdraw()
        self._parts.clear()

    def abandon(self) -> None:
        """Keep what no process has begun from being done, because the load has failed."""
        for trace in self.traces.values():
            trace.withdraw()
        self.withdraw()


def is_worth_it(setting: Setting) -> bool:
    """Whether the load takes longer than the traces, and there are no adapters or drafts. Not on a CPU: its cores are
    busy with the load. Not with experts: each process packs one of all matrices that are alike, and a layer's experts
    may take several GB."""
    config, model_config = setting.config, setting.model_config
    is_long = model_config.num_layers * len(setting.buckets) >= MANY_LAYERS
    has_more = config.enable_lora or config.speculative_config is not None or bool(model_config.sparse_layers)
    return is_long and not (setting.backend.device.is_cpu or has_more)


def begin_early_traces(
    setting: Setting, reopen: Reopen, store: ProgramStore | None, *, is_quantized: bool = False
) -> EarlyTraces | None:
    """Begin to trace the first graphs. reopen: opens the weights again, in another process. is_quantized: all of them.
    None if nothing begins."""
    first, each_bytes = first_buckets(setting.buckets), process_bytes(setting, is_quantized=is_quantized)
    if not (is_worth_it(setting) and can_trace_elsewhere() and has_room(len(first), each_bytes)):
        return None
    try:
        payload = meta.dump((setting, reopen, tuning.current))
    except Exception as error:  # of pickle, for something that it cannot take along
        logger.info("steps are traced once the weights are loaded: %s: %s", type(error).__name__, error)
        return None
    shared = (renderers_of(setting.backend.device), settings(), payload)

    def begin(function: Callable[[Any], Any], what: str, *more: Any) -> Pending | None:
        return begin_elsewhere(function, (*shared, *more), f"the early trace of {what}", 0)

    traces = {bucket: begin(_trace_early, bucket.name, bucket) for bucket in first}
    parts: list[Pending | None] = []
    if num_workers() >= MANY_WORKERS and has_room(2 * len(first) + 2, each_bytes):
        parts = [begin(_kernels_of_layers, f"some layers of {bucket.name}", bucket) for bucket in first]
        parts.append(begin(_kernels_of_sampling, "sampling", first[0]))
        parts.append(begin(_kernels_of_processed, "sampling from processed logits", first[0]))
    return EarlyTraces(
        {bucket: EarlyTrace(one, bucket.name) for bucket, one in traces.items() if one is not None},
        [one for one in parts if one is not None],
        Compiler(store),
    )


def has_room(num_jobs: int, each_bytes: int) -> bool:
    """Whether host memory has room for so many traces at once. Half of what is available is left to the load, which
    packs matrices too and reads its files through the same memory."""
    needed, available = min(num_jobs, num_workers()) * each_bytes, available_bytes()
    if needed <= available // 2:
        return True
    logger.info(
        "%d early traces do not begin: they may take %.1f GB of the host's memory, of which %.1f GB are available",
        num_jobs,
        needed / 1e9,
        available / 1e9,
    )
    return False


def process_bytes(setting: Setting, *, is_quantized: bool) -> int:
    """What an early trace of a model without experts takes of host memory, about and at most: embedding, head and the
    matrices of the largest layer. Quantized ones leave nothing behind: the most that one product's matrices take while
    they are packed."""
    config = setting.model_config
    embedded = config.hidden_size + config.num_layers * config.per_layer_size
    if is_quantized:
        stacked = max(
            max((kind.num_heads + 2 * kind.num_kv_heads) * kind.head_dim, 2 * ffn_size)
            for kind, ffn_size in zip(config.layers, config.ffn_sizes, strict=True)
        )
        return int(max(ALONE_BYTES * config.vocab_size * embedded, STACKED_BYTES * config.hidden_size * stacked))
    columns = max(
        (kind.num_heads + kind.num_kv_heads) * 2 * kind.head_dim + 3 * ffn_size
        for kind, ffn_size in zip(config.layers, config.ffn_sizes, strict=True)
    )
    num_params = config.vocab_size * (embedded + config.hidden_size) + config.hidden_size * columns
    dtype = config.dtype if setting.config.dtype == "auto" else setting.config.dtype
    return num_params * (4 if dtype == "float32" else 2)


# ---- In the process ----


Task = tuple[Mapping[str, Renderer], dict[str, Any], bytes, Bucket]


def _trace_early(task: Task) -> tuple[str, TracedElsewhere]:
    """The step's name, and its trace."""
    with _early_code(task) as code:
        return code.name, trace_both(code)


def _kernels_of_layers(task: Task) -> dict[Key, PackedKernel]:
    """Those of a step of a few layers, which have most of those of all."""
    with _early_code(task) as code:
        model = code.context.model
        model.layers = [*model.layers[:FEW_LAYERS], model.layers[-1]]
        return _packed(trace_step(code.forward, shares_rows=True))


def _kernels_of_sampling(task: Task, *, are_processed: bool = False) -> dict[Key, PackedKernel]:
    """Those of sampling, which all steps share."""
    with _early_code(task) as code:
        context = code.context
        size = code.layout.num_seqs * context.model.logit_stride
        logits = meta.make_tensor(context.backend.device.name, size, dtypes.float)
        state = context.state if are_processed else None
        return _packed(trace_step(partial(code.sample, logits, state), shares_rows=True))


def _kernels_of_processed(task: Task) -> dict[Key, PackedKernel]:
    """Those of sampling from processed logits."""
    return _kernels_of_sampling(task, are_processed=True)


def _packed(step: TracedStep) -> dict[Key, PackedKernel]:
    return {key_of(kernel): PackedKernel.of(kernel) for kernel in dict.fromkeys(step.kernels)}


@contextmanager
def _early_code(task: Task) -> Iterator[StepCode]:
    reach("trace.worker")
    renderers, chosen, payload, bucket = task
    meta.use_meta_devices(renderers)
    setting, reopen, choices = meta.load(payload)
    tuning.use(choices)
    with Context(**chosen):
        yield code_of(bucket, context_without_weights(setting, reopen()))


def context_without_weights(setting: Setting, source: WeightSource) -> GraphContext:
    """What the graphs share, on devices without memory."""
    backend = setting.backend
    with_alike(backend)
    placed = place(setting, source, lambda done, total: None)
    for name in _LOADING:
        delattr(backend, name)  # the settings in a step's name are the backend's attributes
    device, num_rows = backend.device, setting.num_rows
    outputs = tuple(device.zeros(num_rows * OUT_WIDTH, dtypes.int) for _ in range(setting.num_instances))
    state = SamplingState(device, num_rows, setting.model_config.vocab_size)
    return GraphContext(placed.model, backend, placed.pool, placed.capacity, outputs, state, setting.capture)


_LOADING = ("matrix", "stacked", "gate_up", "expert_matrix", "expert_gate_up")


def with_alike(backend: Backend) -> None:
    """Let a backend pack matrices of a shape and a format once: others get planes of the same sizes."""
    for name in _LOADING:
        setattr(backend, name, _once(getattr(backend, name)))


def _once(load: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def load_alike(*args: Any) -> Any:
        key = tuple(map(_key_of, args))
        if key not in known:
            known[key] = load(*args)
            return known[key]
        found = known[key]
        return tuple(map(_like, found)) if isinstance(found, tuple) else _like(found)

    return load_alike


def _key_of(argument: Any) -> Any:
    """What packing depends on besides values."""
    if isinstance(argument, QuantizedMatrix):
        return argument.shape, argument.format
    if isinstance(argument, (list, tuple)):
        return tuple(map(_key_of, argument))
    return (argument.shape, str(argument.dtype)) if hasattr(argument, "dtype") else argument


def _like(matrix: Matrix) -> Matrix:
    planes = tuple(meta.make_tensor(str(one.device), one.numel(), one.dtype) for one in matrix.own_planes)
    shared, maps = matrix.planes[len(planes) :], matrix.maps
    if maps is not None:
        maps = meta.make_tensor(str(maps.device), maps.numel(), maps.dtype)
    shards = tuple(map(_like, matrix.row_shards))
    return replace(matrix, planes=(*planes, *shared), maps=maps, row_shards=shards)
