"""The model on its device: weights, pool and graphs, run by `execute(plan)`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from tinygrad import dtypes

from tinyvllm.config import Capacity, EngineConfig, KVFormats, ModelConfig, ModelFiles, default_cores, usable_cores
from tinyvllm.device.handle import DeviceHandle, open_device
from tinyvllm.device.hardware import hardware_name, processor_name
from tinyvllm.device.jit_replay import check_environment, choose_capture
from tinyvllm.device.mapping import OutputReader
from tinyvllm.device.private_folder import default_root
from tinyvllm.device.program_store import ProgramStore, open_program_store
from tinyvllm.errors import DeviceError, TinyvllmError
from tinyvllm.execution.adapters import AdapterTable
from tinyvllm.execution.buckets import Bucket, make_buckets, within
from tinyvllm.execution.capacity import NO_DRAFT, DraftMemory
from tinyvllm.execution.captures import Captures
from tinyvllm.execution.captures import Progress as Progress  # re-exported for callers
from tinyvllm.execution.early_traces import EarlyTraces, begin_early_traces
from tinyvllm.execution.graphs import Graph, GraphInstance
from tinyvllm.execution.limits import resolve_limits
from tinyvllm.execution.logits_processing import SamplingRows
from tinyvllm.execution.setting import Setting, padded_rows, place
from tinyvllm.execution.step_code import GraphContext, model_digest
from tinyvllm.execution.tracing import prepare_tracing
from tinyvllm.faults import is_poisoned, reach
from tinyvllm.model.drafting import DRAFTING_ARCHITECTURES
from tinyvllm.model.drafting_model import DraftingModel
from tinyvllm.model.dry_load import require_tensors
from tinyvllm.model.pooling import final_norm, pool
from tinyvllm.model.registry import Model, complete_config
from tinyvllm.model.weights.checkpoint import WeightSource, open_checkpoint, with_own_head
from tinyvllm.model.weights.random import AlikeWeights, RandomWeights
from tinyvllm.ops.backend import Backend, KVPool, check_formats, pool_groups
from tinyvllm.ops.backends import make_backend
from tinyvllm.ops.cpu.cores import count_cores
from tinyvllm.ops.cpu.fixed_rows import RowForm
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.kernel.tuning import choices_path, load_choices
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.sampling.sample import OUT_LOGPROB, OUT_RANK, OUT_TOKEN, OUT_TOP, OUT_TOP_LOGPROB, OUT_WIDTH
from tinyvllm.profiling import measure
from tinyvllm.scheduling.adapter_slots import SlotWrite
from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.request import TokenLogprobs
from tinyvllm.storage.model_config import read_model_config

logger = logging.getLogger(__name__)


def load_runner(
    files: ModelFiles, config: EngineConfig, progress: Progress | None = None, *, draft: DraftMemory = NO_DRAFT
) -> ModelRunner:
    """Open the device, load the weights and create the pool; `warm_up` captures the graphs. Call all of it on one
    thread: tinygrad's caches belong to the thread that opened the device. draft: memory to leave for a draft model.

    Raises ModelError, CapacityError, DeviceError.
    """
    model_config = _with_drafting(read_model_config(files), config)
    checkpoint = open_checkpoint(files, model_config)
    model_config = with_own_head(model_config, checkpoint)
    require_tensors(complete_config(model_config), checkpoint)  # at once, and by name
    reopen = functools.partial(open_checkpoint, files, model_config)
    more: dict[str, Any] = {"draft": draft, "reopen": reopen, "is_quantized": checkpoint.is_quantized}
    return make_runner(model_config, checkpoint, config, progress, **more)


def load_random_runner(
    model_config: ModelConfig,
    kind: str,
    config: EngineConfig,
    progress: Progress | None = None,
    *,
    draft: DraftMemory = NO_DRAFT,
) -> ModelRunner:
    """`load_runner` for a shape alone, with random weights of `kind` (float16, Q4_0, ...) seeded by config.seed."""
    source, reopen = RandomWeights(kind, config.seed), functools.partial(AlikeWeights, kind, config.seed)
    more: dict[str, Any] = {"draft": draft, "reopen": reopen, "is_quantized": source.is_quantized}
    return make_runner(model_config, source, config, progress, **more)


def _with_drafting(model_config: ModelConfig, config: EngineConfig) -> ModelConfig:
    """With the model's own drafting layer, if it is asked for. Raises TinyvllmError."""
    wanted = config.speculative_config
    if wanted is None or wanted.method != "mtp":
        return model_config
    if model_config.architecture not in DRAFTING_ARCHITECTURES:
        raise TinyvllmError(
            f"--speculative-config has method 'mtp', but models of architecture {model_config.architecture} have no "
            f"drafting layer, as those of {', '.join(DRAFTING_ARCHITECTURES)} do: choose method ngram or draft_model"
        )
    if config.capture != "replay":
        raise TinyvllmError("--speculative-config has method 'mtp', which cannot run with --capture tinyjit")
    return replace(model_config, has_drafting=True)


def make_runner(
    model_config: ModelConfig,
    source: WeightSource,
    config: EngineConfig,
    progress: Progress | None = None,
    *,
    draft: DraftMemory = NO_DRAFT,
    reopen: Callable[[], WeightSource] | None = None,
    is_quantized: bool = False,
) -> ModelRunner:
    """`load_runner` for known settings, with tensors from `source`. reopen: opens it again, in another process.
    is_quantized: all of its matrices are."""
    report = progress or (lambda stage, done, total: None)
    setting = _make_setting(complete_config(model_config), config, draft)
    device, early = setting.backend.device, None
    store = open_program_store(device.name) if config.compile_cache else None
    if setting.capture == "replay" and (store is None or not store.has_steps):
        prepare_tracing(device, model_config.num_layers, len(setting.buckets))
        early = None if reopen is None else begin_early_traces(setting, reopen, store, is_quantized=is_quantized)

    def advance(done: int, total: int) -> None:
        report("load", done, total)
        if early is not None:
            early.advance()

    try:
        placed = place(setting, source, advance)
    except BaseException:
        if early is not None:
            early.abandon()
        raise
    _warn_if_nothing_is_rounded(config, placed.model.matrices)
    return ModelRunner(
        placed.model,
        setting.backend,
        placed.pool,
        placed.capacity,
        within(setting.buckets, placed.capacity.max_model_len),
        store,
        setting.num_instances,
        setting.capture,
        placed.adapters,
        early=early,
    )


def _make_setting(model_config: ModelConfig, config: EngineConfig, draft: DraftMemory) -> Setting:
    """Open the device, and decide what is known before the weights are loaded. Raises DeviceError."""
    num_cores = count_cores(config.cpu_cores or default_cores(), model_config.layers)
    device = open_device(num_cores, default_root() if config.compile_cache else None)
    if len(device.cores) > usable_cores():
        logger.warning(
            "--cpu-cores is %d, but this process may use %d: kernels wait for each other, and steps take many times as "
            "long; give at most %d",
            *(config.cpu_cores, usable_cores(), usable_cores()),
        )
    capture = choose_capture(config.capture)
    if capture == "tinyjit":
        check_environment()
    free_bytes, share = device.free_memory(), config.gpu_memory_utilization or device.default_share()
    device.check_share(share)
    limits = resolve_limits(config, device)
    _tune_for(device)
    backend = _make_backend(device, config, model_config)
    overlaps = not device.is_cpu if config.async_scheduling is None else config.async_scheduling
    return Setting(
        config,
        model_config,
        backend,
        kv_formats(config, backend, model_config),
        limits,
        tuple(make_buckets(limits, config, functools.partial(backend.short_contexts, model_config.layers))),
        num_instances=2 if overlaps else 1,
        capture=capture,
        free_bytes=free_bytes,
        share=share,
        draft=draft,
    )


def _warn_if_nothing_is_rounded(config: EngineConfig, matrices: Iterable[Matrix]) -> None:
    """Products of 8-bit codes take activations of 16 bits whatever is asked for."""
    rounds = any(matrix.layout == "dot" and RowForm.of(matrix.format, 8).bits == 8 for matrix in matrices)
    if config.activation_bits == 8 and not rounds:
        logger.warning(
            "--activation-bits is 8, but has no effect: only products with matrices of fewer than 8 bits round "
            "activations to 8 bits, and this model has none"
        )


def _make_backend(device: DeviceHandle, config: EngineConfig, model_config: ModelConfig) -> Backend:
    return make_backend(
        device,
        config.dtype,
        model_config.dtype,
        model_config.layers,
        dequantize=config.dequantize,
        activation_bits=config.activation_bits,
        overflows_float16=model_config.overflows_float16,
        unfused=config.unfused,
    )


def _tune_for(device: DeviceHandle) -> None:
    """Take the choices that were measured on this chip."""
    hardware = processor_name() if device.is_cpu else hardware_name(device)
    tuning.use(load_choices(choices_path(default_root().with_name("tuned"), device.name, hardware)))


def kv_formats(config: EngineConfig, backend: Backend, model_config: ModelConfig) -> KVFormats:
    """The formats of the pool. Raises DeviceError for one that the device does not have, and UnsupportedModelError for
    one that the model's heads do not fit."""
    formats = KVFormats.of(*[backend.kv_dtype(wanted, model_config.dtype) for wanted in config.kv_types])
    check_formats(pool_groups(model_config.layers), formats)
    return formats


@dataclass(frozen=True)
class Flight:
    """A step that was enqueued and not yet read."""

    number: int  # counted over all launched steps
    plan: StepPlan
    graph: Graph
    instance: GraphInstance
    reader: OutputReader
    pack_s: float
    packed_s: float  # by perf_counter

    def measured(self, stage: str) -> measure.OpenSpan | measure.Nothing:
        """A span tagged with the step."""
        return measure.span(stage, bucket=self.name, step=self.number)

    @property
    def name(self) -> str:
        return self.graph.bucket.name


class Closable(Protocol):
    def close(self) -> None: ...


class ModelRunner:
    """Owns the device's side of the engine. For one thread."""

    def __init__(
        self,
        model: Model,
        backend: Backend,
        pool: KVPool,
        capacity: Capacity,
        buckets: Sequence[Bucket],
        store: ProgramStore | None = None,
        max_in_flight: int = 1,
        capture: str = "replay",
        adapters: AdapterTable | None = None,
        state: SamplingState | None = None,
        early: EarlyTraces | None = None,
    ) -> None:
        """state: of logits processing; None: memory of its own. early: `Captures`'s."""
        device, num_rows = backend.device, padded_rows(max(capacity.max_num_seqs, capacity.max_verify_rows))
        self.outputs = [device.zeros(num_rows * OUT_WIDTH, dtypes.int) for _ in range(max_in_flight)]
        self._readers = [device.output_reader(output) for output in self.outputs]
        self._num_launched = 0
        self._state = state or SamplingState(device, num_rows, model.config.vocab_size)
        self._rows = SamplingRows(self._state)
        self.model, self.backend, self.pool = model, backend, pool
        context = GraphContext(model, backend, pool, capacity, tuple(self.outputs), self._state, capture)
        self.captures = Captures(buckets, context, store, early)
        self.capacity = capacity
        self.adapters = adapters
        self.closed_with: list[Closable] = []  # a draft model

    @property
    def model_config(self) -> ModelConfig:
        return self.model.config

    @property
    def verify_sizes(self) -> tuple[int, ...]:
        """Token rows of the graphs for steps with drafts, ascending."""
        whole = (bucket for bucket in self.captures.buckets if bucket.max_context is None)
        return tuple(bucket.num_tokens for bucket in whole if bucket.is_verify)

    @property
    def max_in_flight(self) -> int:
        """The number of steps that may be launched before the first is collected."""
        return len(self.outputs)

    @property
    def device(self) -> str:
        return self.backend.device.name

    # -- graphs: docs/ARCHITECTURE.md, "Invariants" ------------------------------------------------------------------

    def warm_up(self, progress: Progress | None = None) -> None:
        """Capture every bucket's graph. Afterwards nothing is compiled any more."""
        self.captures.make_all(progress)
        self._log_tuning()

    def warm_up_first(self, progress: Progress | None = None) -> None:
        """Capture the graphs that serve everything; `captures.advance` captures the others, one after another."""
        self.captures.make_first(progress)
        self._log_tuning()

    def _log_tuning(self) -> None:
        logger.info("kernels are %s", "tuned" if self.is_tuned else "untuned: run `tinyvllm tune` with the same flags")

    @property
    def num_general_operations(self) -> int:
        """Operations, of all layers, in the general kernels because no fused kernel covers them."""
        return self.backend.coverage.count

    @property
    def num_captures(self) -> int:
        """The number of captures."""
        return self.captures.num_made

    # -- steps ---------------------------------------------------------------------------------------------------------

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one step and wait for its tokens. Raises DeviceError if the device fails."""
        flight = self.launch(plan)
        self.sample(flight)
        return self.collect(flight)

    def launch(self, plan: StepPlan) -> Flight:
        """Enqueue one step and the reading of its tokens; with logits processing, only the part before sampling. Raises
        DeviceError."""
        start = time.perf_counter()
        if plan.slot_writes:
            self._write_adapters(plan.slot_writes)
        graph, number = self.captures.graph_for(plan), self._num_launched % len(self.outputs)
        instance = graph.instances[number]
        with measure.span(measure.PACK):
            reach("runner.pack")
            instance.packer.pack(plan)
        packed = time.perf_counter()
        flight = Flight(self._num_launched, plan, graph, instance, self._readers[number], packed - start, packed)
        with self._named_failure(flight), flight.measured(measure.LAUNCH):
            reach("device.copy_in")
            instance.send()
            reach("device.run")
            if plan.needs_logits_processing:
                instance.run_forward()
            else:
                instance.run()
                flight.reader.start()
        self._num_launched += 1
        return flight

    def _write_adapters(self, writes: Sequence[SlotWrite]) -> None:
        """Put adapters into slots. Waits for the steps in flight, which may read what the slots hold."""
        assert self.adapters is not None, "plans with adapters come from an engine that has some"
        self.wait()
        for write in writes:
            reach("adapter.write")
            self.adapters.write(write)

    def sample(self, flight: Flight) -> None:
        """Enqueue the sampling of a step with logits processing, whose masks depend on the previous step's tokens: that
        step must have been committed. Does nothing for other steps. Raises DeviceError."""
        if not flight.plan.needs_logits_processing:
            return
        with measure.span(measure.PACK):
            self._rows.pack(flight.plan, flight.instance.packer.views)
        with self._named_failure(flight), flight.measured(measure.LAUNCH):
            reach("device.copy_in")
            flight.instance.send()
            reach("device.run")
            flight.instance.run_processed()
            flight.reader.start()

    def collect(self, flight: Flight) -> StepOutput:
        """Wait for a launched step's tokens. Raises DeviceError."""
        with self._named_failure(flight), flight.measured(measure.WAIT):
            reach("device.copy_out")
            rows = flight.reader.read().reshape(-1, OUT_WIDTH)
            if is_poisoned("device.logits"):
                rows[0, OUT_TOKEN] = -1
        read_s = time.perf_counter()
        with self._named_failure(flight), flight.measured(measure.TOKENS):
            pooled = self._pool_states(flight)
            output = make_output(flight.plan, rows, pack_s=flight.pack_s, device_s=read_s - flight.packed_s)
        tokens_s = time.perf_counter() - read_s
        return dataclasses.replace(output, num_rows=flight.graph.bucket.num_tokens, pooled=pooled, tokens_s=tokens_s)

    def _pool_states(self, flight: Flight) -> tuple[np.ndarray, ...]:
        """By pooled entry (hidden,) float32: the sum of its rows' states after the final norm, or the last row's."""
        if not flight.plan.pooled:
            return ()
        reach("device.pool")
        tokens = flight.graph.layout.num_tokens
        parts = [self.backend.device.read_floats(buffer).reshape(tokens, -1) for buffer in flight.instance.hidden]
        norm = self.model.norm
        weight = self.backend.device.read_floats(norm.weight.uop.base.buffer)
        states = final_norm(np.concatenate(parts, axis=1), weight, norm.eps)  # (T, hidden)
        pooled, row = [], 0
        for entry in flight.plan.entries:
            rows = states[row : row + entry.count]
            if entry.request.pooling is not None:
                pooled.append(pool(rows, entry.request.pooling, self.model.score))
            row += entry.count
        return tuple(pooled)

    @contextmanager
    def _named_failure(self, flight: Flight) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DeviceError(f"step {flight.name} failed on {self.device}: {error}") from error

    def close(self) -> None:
        """Release graphs, pool and weights, and what is closed with it. The runner cannot be used again."""
        for other in self.closed_with:
            other.close()
        self.closed_with.clear()
        if self.adapters is not None:
            self.adapters.close()
        self.captures.clear()
        self.pool.clear()

    def drafting_runner(self) -> ModelRunner:
        """The runner of the model's drafting layer, on the same pool. It is closed with this one."""
        model = self.model
        assert model.drafting is not None and model.hidden is not None, "the model was loaded without a drafting layer"
        runner = ModelRunner(
            DraftingModel(model, model.drafting, model.hidden),
            self.backend,
            self.pool,
            replace(self.capacity, has_drafting=False, num_state_slots=0, max_verify_rows=0),
            [bucket for bucket in self.buckets if bucket.is_decode and not bucket.has_adapters],
            open_program_store(self.device) if self.store is not None else None,
            self.max_in_flight,
            self.captures.capture,
            state=self._state,
        )
        self.closed_with.append(runner)
        return runner

    # -- its parts ---------------------------------------------------------------------------------------------------

    def tuning_name(self, bucket: Bucket) -> str:
        """The name of a bucket of this model in `Choices.searched`."""
        name = model_digest(self.model, self.backend)
        name += f" {self.pool.formats.name}" if self.pool.formats.is_quantized else ""
        return f"{name} {bucket.name} of {self.capacity.max_num_seqs} x {self.capacity.max_model_len}"

    @property
    def is_tuned(self) -> bool:
        """Whether every bucket was searched."""
        return all(self.tuning_name(bucket) in tuning.current.searched for bucket in self.buckets)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Decode buckets by size, then token buckets."""
        return self.captures.buckets

    @property
    def store(self) -> ProgramStore | None:
        """Programs and steps saved for the next start."""
        return self.captures.store

    def wait(self) -> None:
        """Return when the device has run everything that was launched."""
        self.backend.device.wait()


def make_output(plan: StepPlan, rows: np.ndarray, *, pack_s: float, device_s: float) -> StepOutput:
    """Unpack the graph's (R, OUT_WIDTH) int32 rows: first those that sample, then the scores."""
    num_sampled = plan.num_sampled_rows
    tokens = tuple(rows[:num_sampled, OUT_TOKEN].tolist())
    logprobs: tuple[TokenLogprobs | None, ...] = (None,) * num_sampled
    if plan.has_logprobs:
        counts = [entry.request.params.logprobs for entry in plan.sampled for _ in range(entry.num_sampled)]
        logprobs = tuple(read_logprobs(row, count) for row, count in zip(rows, counts, strict=False))
    scores, start = [], num_sampled
    for entry in plan.scored:
        of_entry = rows[start : start + entry.num_scored]
        scores.append(tuple(read_scores(of_entry, entry.request.num_prompt_logprobs or 0)))
        start += entry.num_scored
    return StepOutput(tokens, logprobs, tuple(scores), pack_s, device_s)


def read_logprobs(row: np.ndarray, count: int | None) -> TokenLogprobs | None:
    """The logprobs of one output row with the `count` likeliest tokens, or None if `count` is."""
    return None if count is None else next(read_scores(row[None], count))


def read_scores(rows: np.ndarray, count: int) -> Iterator[TokenLogprobs]:
    """The logprobs of output rows with up to `count` likeliest tokens: a vocabulary may have fewer."""
    floats = rows.view(np.float32)
    for row, values in zip(rows, floats, strict=True):
        ids = row[OUT_TOP : OUT_TOP + count].tolist()
        tops = zip(ids, values[OUT_TOP_LOGPROB : OUT_TOP_LOGPROB + count].tolist(), strict=True)
        top = tuple((token_id, value) for token_id, value in tops if token_id >= 0)
        yield TokenLogprobs(float(values[OUT_LOGPROB]), top, int(row[OUT_RANK]))
