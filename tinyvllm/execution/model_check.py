"""What a model needs here, and what runs it, from its files' headers: nothing is loaded.

A format is learned by reading the smallest matrix that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from tinyvllm.arrays import SCALE_DTYPES, Format, QuantizedMatrix
from tinyvllm.config import FLOAT16_KV, EngineConfig, KVFormats, Limits, ModelConfig, ModelFiles
from tinyvllm.device.kinds import KINDS, kind_of
from tinyvllm.errors import CapacityError
from tinyvllm.execution.capacity import KVGroup, MemoryFacts, plan_capacity, scratch_bytes
from tinyvllm.execution.limits import limits_of_kind
from tinyvllm.model.dry_load import require_tensors
from tinyvllm.model.registry import complete_config
from tinyvllm.model.weights.checkpoint import open_checkpoint, unread_lines, with_own_head
from tinyvllm.model.weights.names import unwrapped
from tinyvllm.model.weights.safetensors import read_safetensors
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.ops.backend import pool_groups
from tinyvllm.ops.formats.runs import uncovered
from tinyvllm.storage import families
from tinyvllm.storage.model_config import read_model_config

DENSE = {"float32": 4, "float16": 2, "bfloat16": 2}
USEFUL_CONTEXT = 4096  # tokens of one sequence: with less room for keys and values a model is not worth loading
EXPERTS = "experts"
# Parts of a model by what their tensors' names contain, in the order of the table
CLASSES = (
    ("embeddings", "embed_tokens"),
    ("head", "lm_head"),
    ("attention", "self_attn"),
    (EXPERTS, ".experts."),
    ("router", ".mlp.gate."),
    ("recurrence", "linear_attn"),
    ("recurrence", ".conv."),
    ("feed-forward", "mlp"),
)


@dataclass(frozen=True)
class TensorClass:
    """The matrices of one part in one format. `device_bytes`: on the device that was asked about."""

    part: str
    format_name: str
    num_tensors: int
    num_weights: int
    file_bytes: int
    device_bytes: int


@dataclass(frozen=True)
class KVCost:
    """Keys and values of the layers that keep the same tokens."""

    num_layers: int  # that store keys and values
    bytes_per_token: int
    window: int | None  # tokens that are kept; None: all


@dataclass(frozen=True)
class ModelReport:
    """What a model's files say. `general`: by device, what runs in the general form, in words; empty: nothing."""

    architecture: str
    source: str
    config: ModelConfig
    classes: tuple[TensorClass, ...]
    kv: tuple[KVCost, ...]
    left_out: tuple[str, ...] = ()
    general: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def num_weights(self) -> int:
        return sum(one.num_weights for one in self.classes)

    @property
    def num_active(self) -> int:
        """Weights that a token passes through: all but those of experts that are not chosen for it."""
        experts = self.config.experts
        in_experts = sum(one.num_weights for one in self.classes if one.part == EXPERTS)
        chosen = 0 if experts is None else in_experts * experts.top_k // experts.num_experts
        return self.num_weights - in_experts + chosen

    @property
    def device_bytes(self) -> int:
        return sum(one.device_bytes for one in self.classes)

    def kv_bytes(self, num_tokens: int) -> int:
        """Keys and values of one sequence of that length."""
        return sum(one.bytes_per_token * min(num_tokens, one.window or num_tokens) for one in self.kv)


@dataclass(frozen=True)
class Fit:
    """How much of a model's context a device holds. `problem`: why not one token fits."""

    device: str
    memory_bytes: int
    share: float  # for weights and KV cache
    context: int
    problem: str = ""


@dataclass(frozen=True)
class LeastMemory:
    """Bytes without which a model cannot be loaded. `kv`: of one sequence of `context` tokens, with its states."""

    weights: int
    scratch: int
    kv: int
    context: int


def examine_files(files: ModelFiles, device: str, kv: KVFormats = FLOAT16_KV) -> ModelReport:
    """Read the headers. `device`: tinygrad's name of the one whose memory counts; `kv`: as `EngineConfig.planned_kv`.
    Raises ModelError for files that cannot be run, with the reason."""
    config = complete_config(read_model_config(files))
    checkpoint = open_checkpoint(files, config)
    config = with_own_head(config, checkpoint)
    require_tensors(config, checkpoint)
    formats = dict(_formats(checkpoint.tensors))
    is_cpu = kind_of(device).name == "CPU"
    return ModelReport(
        architecture=config.architecture,
        source=_source(files, formats),
        config=config,
        classes=tuple(_classes(checkpoint.tensors, formats, is_cpu)),
        kv=tuple(_kv_costs(config, kv)),
        left_out=tuple(_left_out(files, config)),
        general={name: tuple(_general(name, config, formats)) for name in KINDS},
    )


def fit(report: ModelReport, device: str, memory_bytes: int | None = None) -> Fit:
    """The longest context of one sequence on a device with `memory_bytes` free; None: those of this computer. Raises
    DeviceError if the device is not here."""
    kind = kind_of(device)
    if memory_bytes is None:
        kind.check()
        memory_bytes = kind.free_memory(device)
    limits = replace(limits_of_kind(device, memory_bytes), max_num_seqs=1)
    facts = MemoryFacts(
        free_bytes=memory_bytes,
        share=kind.default_share,
        weight_bytes=report.device_bytes,
        scratch_bytes=scratch_bytes(limits, report.config),
        kv_groups=tuple(KVGroup(one.bytes_per_token, one.window) for one in report.kv),
        state_bytes=report.config.state_bytes,
    )
    try:
        capacity = plan_capacity(EngineConfig("", max_num_seqs=1), limits, report.config, facts)
    except CapacityError as error:
        return Fit(device, memory_bytes, kind.default_share, 0, str(error))
    return Fit(device, memory_bytes, kind.default_share, capacity.max_model_len)


def least_memory(report: ModelReport, config: EngineConfig, limits: Limits, device: str) -> LeastMemory:
    """What a model needs on `device` to be loaded by these settings. An estimate, which leaves out a GPU's driver."""
    weights = report.device_bytes
    if config.dequantize:
        weights = report.num_weights * (4 if kind_of(device).name == "CPU" else 2)
    context = config.max_model_len or min(report.config.usual_context, USEFUL_CONTEXT)
    step = min(context, limits.max_num_batched_tokens)
    kept = ((one, context if one.window is None else min(context, one.window + step)) for one in report.kv)
    kv = sum(one.bytes_per_token * (num_tokens + 2 * config.block_size) for one, num_tokens in kept)
    return LeastMemory(
        weights=weights,
        scratch=scratch_bytes(limits, report.config),
        kv=kv + 2 * report.config.state_bytes,
        context=context,
    )


def default_device() -> str:
    """The device that the engine would choose here."""
    return next(kind.name for kind in KINDS.values() if kind.is_default())


# --- Formats -------------------------------------------------------------------------------------------------------


def _formats(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Format | None]]:
    """Formats by name, of quantized matrices; None for those that are converted when they are loaded."""
    smallest: dict[str, StoredTensor] = {}
    for tensor in tensors.values():
        if len(tensor.shape) > 1 and tensor.format_name not in DENSE:
            known = smallest.get(tensor.format_name)
            if known is None or prod(tensor.shape) < prod(known.shape):
                smallest[tensor.format_name] = tensor
    for name, tensor in smallest.items():
        matrix = tensor.read()
        yield name, matrix.format if isinstance(matrix, QuantizedMatrix) else None


def bytes_per_weight(form: Format) -> float:
    """On the device: codes, and the scales of their groups."""
    scales = sum(
        SCALE_DTYPES[scale.dtype].itemsize / scale.span + (1 / form.group if scale.has_steps else 0)
        for scale in form.scales
    )
    return form.bits / 8 + scales


def _device_bytes(tensor: StoredTensor, form: Format | None, is_cpu: bool) -> float:
    count = prod(tensor.shape)
    if form is not None:
        # the codes of a grid are packed as in the file
        return tensor.num_bytes if form.grid is not None else count * bytes_per_weight(form)
    if tensor.format_name in DENSE:
        return count * (DENSE[tensor.format_name] if is_cpu else 2)  # a GPU's are float16 or bfloat16
    return count * 2  # converted


def _classes(
    tensors: Mapping[str, StoredTensor], formats: Mapping[str, Format | None], is_cpu: bool
) -> Iterator[TensorClass]:
    groups: dict[tuple[str, str], list[StoredTensor]] = {}
    for name, tensor in tensors.items():
        part = next((part for part, text in CLASSES if text in name), "others") if len(tensor.shape) > 1 else "norms"
        groups.setdefault((part, tensor.format_name), []).append(tensor)
    order = [part for part, _ in CLASSES]
    rank = {part: index for index, part in enumerate((*order, "others", "norms"))}
    for (part, format_name), found in sorted(groups.items(), key=lambda item: (rank[item[0][0]], item[0][1])):
        on_device = sum(_device_bytes(tensor, formats.get(format_name), is_cpu) for tensor in found)
        yield TensorClass(
            part,
            format_name,
            len(found),
            sum(prod(tensor.shape) for tensor in found),
            sum(tensor.num_bytes for tensor in found),
            int(on_device),
        )


def _source(files: ModelFiles, formats: Mapping[str, Format | None]) -> str:
    if files.kind == "gguf":
        return "GGUF file"
    return "MLX directory" if any(name.startswith("mlx") for name in formats) else "Hugging Face directory"


def _left_out(files: ModelFiles, config: ModelConfig) -> Iterator[str]:
    """Parts of a model that are not read."""
    unread = families.KNOWN_ARCHITECTURES[config.architecture].hf_unread
    if files.kind == "hf" and unread:
        yield from unread_lines(unwrapped(read_safetensors(files.path)), unread)


# --- KV cache and kernels ------------------------------------------------------------------------------------------


def _kv_costs(config: ModelConfig, formats: KVFormats) -> Iterator[KVCost]:
    for group in pool_groups(config.layers, config.max_position):
        yield KVCost(len(group.shapes), group.token_bytes(formats), group.window)


def _general(device: str, config: ModelConfig, formats: Mapping[str, Format | None]) -> Iterator[str]:
    """What no fused kernel of a device covers. A rule: `tinyvllm doctor MODEL` traces the steps themselves."""
    if device == "CL":
        yield "every product and attention: OpenCL has no fused kernels"
    if device in ("METAL", "CUDA"):
        for name, form in formats.items():
            if form is not None and (reason := uncovered(form)):
                yield f"products of {name}, which has {reason}"


def as_json(report: ModelReport, fitting: Fit | None) -> dict[str, Any]:
    """The report as JSON values."""
    config = report.config
    return {
        "architecture": report.architecture,
        "source": report.source,
        "parameters": report.num_weights,
        "active_parameters": report.num_active,
        "layers": config.num_layers,
        "max_position": config.max_position,
        "weights": [vars(one) for one in report.classes],
        "weight_bytes": report.device_bytes,
        "kv_cache": [vars(one) for one in report.kv],
        "state_bytes": config.state_bytes,
        "left_out": list(report.left_out),
        "general_kernels": {name: list(lines) for name, lines in report.general.items()},
        "device": None
        if fitting is None
        else {
            "name": fitting.device,
            "memory_bytes": fitting.memory_bytes,
            "share": fitting.share,
            "context": fitting.context,
            "problem": fitting.problem or None,
        },
    }
