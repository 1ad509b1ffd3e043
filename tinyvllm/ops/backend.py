"""The operations that a transformer layer is made of: the protocol that each kind of device implements.

Activations are flat tensors, (T * columns,): one row after another. A model uses `Backend` only, so everything that
differs between devices (layouts, fusion, kernels) is in this room. `reference.py` has each operation in NumPy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyvllm.arrays import HostMatrix, QuantizedMatrix, copy_all, stack_rows, take_rows, to_float16
from tinyvllm.config import KVFormat, KVFormats, LayerKind, StateKind, stored_window
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.ops.adapter_spec import AdapterSite, SiteShape
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.coverage import Coverage, in_words
from tinyvllm.ops.experts_spec import ExpertLayer, Routing
from tinyvllm.ops.formats.common import in_common_format
from tinyvllm.ops.formats.matrix import PANEL, Matrix
from tinyvllm.ops.latent_spec import LatentLayer
from tinyvllm.ops.recurrent_spec import RecurrentLayer
from tinyvllm.ops.sampling.logits_processing import SamplingState, sample_processed
from tinyvllm.ops.sampling.sample import OUT_WIDTH, SampleSpec, sample
from tinyvllm.ops.short_conv import ConvLayer
from tinyvllm.ops.step_inputs import StepLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolGroup:
    """Layers that share a block table, because they need the keys and values of the same tokens: those of the same
    window, whatever the shape of their keys. A layer that reads another layer's keys stores none and is in no group."""

    shapes: dict[int, tuple[int, int]]  # by layer: K, D; of a latent 1, and its elements
    window: int | None = None  # tokens that are needed, the newest included; None: all
    latents: frozenset[int] = frozenset()  # layers that store one latent for each token, as keys without values

    def token_bytes(self, formats: KVFormats) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(
            formats.keys.num_bytes(math.prod(shape)) if layer in self.latents else formats.num_bytes(math.prod(shape))
            for layer, shape in self.shapes.items()
        )


def pool_groups(layers: Sequence[LayerKind], max_model_len: int | None = None) -> tuple[PoolGroup, ...]:
    """The groups of a model's layers: first the one that keeps all tokens, then those of windows, the widest first. A
    window that no sequence exceeds is none. A model has at least one group."""
    by_window: dict[int | None, dict[int, tuple[int, int]]] = {}
    latents = {index: kind.latent for index, kind in enumerate(layers) if kind.latent is not None}
    for index, kind in enumerate(layers):
        if kind.stores_kv:
            window = stored_window(layers, index)
            if window is not None and max_model_len is not None and window >= max_model_len:
                window = None
            shape = (kind.num_kv_heads, kind.head_dim)
            if index in latents:
                shape = (1, latents[index].stored_dim)
            by_window.setdefault(window, {})[index] = shape
    groups = [
        PoolGroup(shapes, window, frozenset(latents.keys() & shapes.keys())) for window, shapes in by_window.items()
    ]
    return tuple(sorted(groups, key=lambda group: -math.inf if group.window is None else -group.window))


def group_of(groups: Sequence[PoolGroup], layer: int) -> int:
    """The number of the group that holds a layer's keys and values."""
    return next(number for number, group in enumerate(groups) if layer in group.shapes)


Stored: TypeAlias = Tensor | tuple[Tensor, ...]  # a layer's keys or values; a tuple: each CPU core's
NO_STATES: Mapping[int, StateKind] = {}
WORD_BYTES = 4  # of the words in which a GPU keeps codes


@dataclass
class KVPool:
    """The paged KV cache. Each flat tensor of a layer consists of `num_blocks` equal parts, its blocks in order.

    Quantized keys and values are codes: bytes, or on a GPU words of four (`code_dtype`). Their scales, if the format
    has any, are float16 tensors of their own, in the same order of slots, heads and groups."""

    keys: dict[int, Stored]  # by layer
    values: dict[int, Stored]  # by layer, except those whose keys are latents
    num_blocks: dict[int, int]  # by layer
    formats: KVFormats
    key_scales: dict[int, Stored] = field(default_factory=dict)  # by layer, if the format of keys has scales
    value_scales: dict[int, Stored] = field(default_factory=dict)
    # by recurrent layer, float32: the matrices (Hv, Dk, Dv) of each slot, and its convolution's inputs (conv_width,
    # conv_size), of which each CPU core has its own heads' (config.StateKind)
    matrices: dict[int, Stored] = field(default_factory=dict)
    convs: dict[int, Stored] = field(default_factory=dict)
    num_state_slots: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, including each core's of a layer that is sharded."""
        by_layer = (self.keys, self.values, self.key_scales, self.value_scales, self.matrices, self.convs)
        stored = [entry for layers in by_layer for entry in layers.values()]
        return [tensor for entry in stored for tensor in _each(entry)]

    @property
    def state_tensors(self) -> list[Tensor]:
        """Those of recurrent states."""
        stored = (*self.matrices.values(), *self.convs.values())
        return [tensor for entry in stored for tensor in _each(entry)]

    def planes_of(self, layer: int) -> tuple[Stored, ...]:
        """Of one layer that has keys and values, or latents, of its own: keys, values, the keys' scales and the
        values', as far as there are any. The order of `AttentionSpec.take_planes`."""
        by_layer = (self.keys, self.values, self.key_scales, self.value_scales)
        return tuple(layers[layer] for layers in by_layer if layer in layers)

    def tensors_of(self, layer: int) -> list[Tensor]:
        """Those of `planes_of`, of every core."""
        return [tensor for entry in self.planes_of(layer) for tensor in _each(entry)]

    def clear(self) -> None:
        """Release the memory."""
        for layers in (self.keys, self.values, self.key_scales, self.value_scales, self.matrices, self.convs):
            layers.clear()

    def codes_of(self, layer: int) -> list[tuple[Tensor, KVFormat]]:
        """Those of keys and values, without scales, and their formats."""
        stored = ((self.keys, self.formats.keys), (self.values, self.formats.values))
        return [(tensor, form) for layers, form in stored for tensor in _each(layers.get(layer, ()))]


def _each(stored: Stored | tuple[()]) -> tuple[Tensor, ...]:
    """The tensors of all cores."""
    return stored if isinstance(stored, tuple) else (stored,)


def blocks_by_layer(groups: Sequence[PoolGroup], num_blocks: int | Sequence[int]) -> dict[int, int]:
    """The number of blocks of each layer in a pool with `num_blocks` blocks in each group, or in all of them."""
    counts = [num_blocks] * len(groups) if isinstance(num_blocks, int) else num_blocks
    found = {layer: count for group, count in zip(groups, counts, strict=True) for layer in group.shapes}
    return dict(sorted(found.items()))


def as_formats(formats: KVFormats | str) -> KVFormats:
    """The formats of a pool, of which a name is that of both."""
    return KVFormats.of(formats) if isinstance(formats, str) else formats


def check_formats(groups: Sequence[PoolGroup], formats: KVFormats) -> None:
    """Raise UnsupportedModelError, which names the layer, if a pool of these layers cannot be quantized like that."""
    for form in (formats.keys, formats.values):
        if not form.is_quantized:
            continue
        for layer, (_, head_dim) in sorted(shape for group in groups for shape in group.shapes.items()):
            unit = form.group or WORD_BYTES
            if layer in latent_layers(groups):
                problem, others = "stores latents (MLA), which are not quantized", "auto, float16 or float32"
            elif head_dim % unit:
                problem = f"has heads of {head_dim} dimensions, but {form.name} needs a multiple of {unit}"
                others = "auto, float16 or float32" if head_dim % WORD_BYTES else "auto, float16, float32 or fp8_e4m3"
            else:
                continue
            raise UnsupportedModelError(f"--kv-cache-dtype is {form.name}, but layer {layer} {problem}: give {others}")


def code_dtype(form: KVFormat, device: DeviceHandle) -> DType:
    """The dtype of a plane of keys or values. Codes are words on a GPU, which loads vectors of them."""
    if not form.is_quantized:
        return FLOATS[form.name]
    return dtypes.uint if device.has_threads else dtypes.uint8


def zeroed_plane(device: DeviceHandle, form: KVFormat, num_elements: int, core: str | None = None) -> Tensor:
    """A zeroed tensor of keys or values of whole heads."""
    dtype = code_dtype(form, device)
    return device.zeros(form.code_bytes(num_elements) // dtype.itemsize, dtype, core)


def zeroed_pool(
    device: DeviceHandle,
    groups: Sequence[PoolGroup],
    num_blocks: int | Sequence[int],
    block_size: int,
    formats: KVFormats | str,
    states: Mapping[int, StateKind] = NO_STATES,
    num_state_slots: int = 0,
) -> KVPool:
    """A pool with one tensor of keys and one of values for each layer, and those of their scales; of keys alone where
    they are latents."""
    counts, formats = blocks_by_layer(groups, num_blocks), as_formats(formats)
    check_formats(groups, formats)
    pool = KVPool({}, {}, counts, formats, num_state_slots=num_state_slots)
    shapes = {layer: shape for group in groups for layer, shape in group.shapes.items()}
    planes = ((formats.keys, pool.keys, pool.key_scales), (formats.values, pool.values, pool.value_scales))
    for layer, count in counts.items():
        size = count * block_size * math.prod(shapes[layer])
        for form, codes, scales in planes[: 1 if layer in latent_layers(groups) else 2]:
            codes[layer] = zeroed_plane(device, form, size)
            if form.group:
                scales[layer] = device.zeros(form.num_scales(size), FLOATS["float16"])
    for layer, kind in states.items():
        if kind.matrix_elements:
            pool.matrices[layer] = device.zeros(num_state_slots * kind.matrix_elements, FLOATS["float32"])
        pool.convs[layer] = device.zeros(num_state_slots * kind.conv_elements, FLOATS["float32"])
    return pool


def latent_layers(groups: Sequence[PoolGroup]) -> frozenset[int]:
    """The layers that store latents."""
    return frozenset().union(*(group.latents for group in groups))


@dataclass(frozen=True)
class Step:
    """One step, as its operations see it. `kept`: what operations computed from the inputs for all layers, by name."""

    layout: StepLayout
    inputs: Tensor  # int32, fields as in StepLayout
    pool: KVPool
    is_decode: bool  # every row is the last token of a sequence of its own
    # a few rows, perhaps several of a sequence: attention works row by row as in a decode, but a row may attend to
    # others of its step, so all keys and values are written first
    verifies: bool = field(default=False, kw_only=True)
    previous_output: Tensor | None = None  # the previous step's, for tokens that the host does not know yet
    kept: dict[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: its weight (columns,) float32, and epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What follows a product y = x @ w.T, in this order: y + bias; activation(gate) * up, if y's columns are both of
    them (`Weights.gate_up`); RMSNorm; * scale; + residual; * out_scale; softcap * tanh(y / softcap)."""

    bias: Tensor | None = None  # (N,) float32
    activation: str | None = None  # a name of ops/activation.py
    post_norm: Norm | None = None
    scale: float = 1.0
    residual: Tensor | None = None  # (T * N,)
    out_scale: Tensor | None = None  # (1,) float32: data, so that layers share a kernel
    softcap: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing follows the product."""
        return self.activation is None and self.residual is None and not self.uncovered()

    def features(self) -> dict[str, bool]:
        """The features beyond an activation and a residual, by their names in messages, and whether this has each."""
        return {
            "a bias": self.bias is not None,
            "a norm after it": self.post_norm is not None,
            "a scale": self.scale != 1.0,
            "a scale after the residual": self.out_scale is not None,
            "a softcap": self.softcap is not None,
        }

    def uncovered(self, covered: Sequence[str] = ()) -> str:
        """The features of this epilogue that are not in `covered`, in words; "" if there are none."""
        return in_words([name for name, has in self.features().items() if has and name not in covered])


PLAIN = Epilogue()


class Weights(Protocol):
    """How matrices and the pool are placed on a device."""

    device: DeviceHandle

    def matrix(self, host: HostMatrix) -> Matrix:
        """Put one matrix on the device."""

    def stacked(self, hosts: Sequence[HostMatrix], num_kv_heads: int | None = None) -> tuple[Matrix, ...]:
        """Matrices with the same input, stacked: one if their formats agree, otherwise as few as possible.
        `num_kv_heads`: set if they are q, k and v: the number of KV heads."""

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """The two halves of a gated feed-forward as one matrix, arranged for an epilogue with an activation."""

    def expert_matrix(self, host: HostMatrix, num_experts: int) -> Matrix:
        """One matrix of all experts, (E * rows, columns). An expert's rows are a multiple of 32."""

    def expert_gate_up(self, gate: HostMatrix, up: HostMatrix, num_experts: int) -> Matrix:
        """The halves of all experts' gated feed-forwards, (E * ffn, K) each, as one matrix in which each expert is
        arranged as `gate_up` arranges one."""

    def adapter_site(self, shape: SiteShape) -> AdapterSite:
        """A product's empty slots for adapters."""

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """The name of the format of keys, or of values: `wanted`, or if that is "auto", one that suits the device and
        the checkpoint's dtype, `stored`. Raises DeviceError for one that the device does not have."""

    def make_rows(self, size: int) -> Tensor:
        """Zeroed memory for `size` values of activations, which outlives steps."""

    def make_pool(
        self,
        groups: Sequence[PoolGroup],
        num_blocks: int | Sequence[int],
        block_size: int,
        formats: KVFormats | str,
        states: Mapping[int, StateKind] = NO_STATES,
        num_state_slots: int = 0,
    ) -> KVPool:
        """A zeroed pool with `num_blocks` blocks in each group, or in all of them, and `num_state_slots` slots, the
        dummy included, for the states of the recurrent layers `states`. `formats`: a name is that of keys and values.
        Raises UnsupportedModelError as `check_formats`."""


class Operations(Protocol):
    """What a layer computes. Every operation has a general form for any arguments. Calls that a device's fused kernels
    do not cover run in the general form, and are noted in `coverage`."""

    coverage: Coverage

    def short_contexts(self, layers: Sequence[LayerKind], num_rows: int, verifies: bool) -> tuple[int, ...]:
        """The numbers of tokens up to which contexts have faster kernels, ascending, in steps that decode so many rows
        or verify drafts in them, and in graphs that are for no longer contexts."""

    def embed(self, table: Matrix, step: Step, scale: float = 1.0, ids: str = "token_ids") -> Tensor:
        """(T * K,): the rows of `table` named by the token ids in the step's field `ids`, times `scale`. An id of
        -1 - r stands for the token in row r of the step's `previous_output`."""

    def linear(
        self,
        name: str,
        x: Tensor,
        matrices: Sequence[Matrix],
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> list[Tensor]:
        """epilogue(norm(x) @ w.T) for each matrix: [(T * N,)]. Several matrices have the plain epilogue."""

    def adapt(
        self,
        x: Tensor,
        outs: Sequence[Tensor],
        site: AdapterSite,
        step: Step,
        norm: Norm | None = None,
        scale: float = 1.0,
    ) -> list[Tensor]:
        """outs + scale * (B A norm(x)) of each row's adapter (ops/adapter_spec.py). `outs`: the parts of the site's
        product, or of what it is added to, which are overwritten."""

    def adapt_gated(
        self,
        x: Tensor,
        product: Tensor,
        site: AdapterSite,
        step: Step,
        norm: Norm | None,
        activation: str,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(T * ffn,): activation(gate) * up of a product with a matrix of `gate_up`, after `bias` (2 * ffn,) and what
        each row's adapter adds. The product is overwritten."""

    def attend(self, qkv: Sequence[Tensor], layer: AttentionLayer, step: Step) -> Tensor:
        """(T * H * D,): rotate, write keys and values to their slots, and attend."""

    def route(self, x: Tensor, layer: ExpertLayer, num_tokens: int, norm: Norm | None = None) -> Routing:
        """Which experts each row of norm(x) passes through, as `ExpertsKind` describes it. Of equal scores the expert
        with the lower number is chosen. Ids are those of experts even where x is not finite."""

    def experts(
        self,
        x: Tensor,
        routing: Routing,
        layer: ExpertLayer,
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> Tensor:
        """(T * hidden,): epilogue(sum over a token's experts of weight * expert(norm(x))). Of weights, a step reads
        those of the experts that were chosen. The epilogue has neither a bias nor an activation."""

    def scale_rows(self, x: Tensor, factors: Tensor, num_tokens: int) -> Tensor:
        """(T * N,): row t of x times factors[t]."""

    def finish(self, x: Tensor, num_tokens: int, epilogue: Epilogue) -> Tensor:
        """(T * N,): epilogue(x), which has neither a bias nor an activation: of a sum that is not one product's."""

    def attend_latent(self, queries: Tensor, latents: Tensor, layer: LatentLayer, step: Step) -> Tensor:
        """(T * H * value,): norm and rotate the latents (T, rank + rope), write them to their slots, rotate the last
        part of each head's query (T, H, nope + rope), and attend."""

    def recur(self, projections: Sequence[Tensor], layer: RecurrentLayer, step: Step) -> Tensor:
        """(T * Hv * Dv,): a recurrent layer's outputs, normed and gated (`RecurrentLayer` has the equations).

        Sequence s of the step has rows [first_rows[s], first_rows[s + 1]); in a decode step, row s. It starts from the
        state in slot state_reads[s], or from zeros if its first row is at position 0, and leaves its state after its
        last row in slot state_writes[s]. The two may be equal, and several sequences may read a slot that none of them
        writes. A sequence that has no rows, or writes to slot 0, touches no other slot than 0; its outputs are zeros,
        as are those of padding."""

    def convolve(self, projected: Tensor, layer: ConvLayer, step: Step) -> Tensor:
        """(T * channels,): a gated short convolution. States are read and written as by `recur`. The projection's
        matrix is stacked from b, c and x by units of 32 rows (`Weights.stacked`)."""

    def norm_groups(self, x: Tensor, norm: Norm, num_tokens: int, addend: Tensor) -> Tensor:
        """(T * M,): RMSNorm of each group of x's columns that is as wide as the norm's weight, plus `addend` (T * M,).
        Groups are the same in number of columns; the result is in one tensor, also on several cores."""

    def gate_columns(self, gate: Tensor, factors: Tensor, start: Tensor, num_tokens: int, activation: str) -> Tensor:
        """(T * N,): activation(gate) * N columns, from `start` (1,) int32 on, of `factors` (T * M,), which
        `norm_groups` returned, or `attend` (M = N; the gate's matrix is then stacked by KV heads)."""

    def take_rows(self, x: Tensor, step: Step, num_cols: int, num_rows: int | None = None) -> Tensor:
        """(R * columns,): the rows of x, which has `num_rows` (None: as many as the step), that the step's logit rows
        name."""

    def store_normed(self, x: Tensor, norm: Norm, num_tokens: int, out: Tensor, start: int, stride: int) -> Tensor:
        """`out`, whose element start + t * stride is now the first of row t of norm(x)."""

    def parts_of(self, x: Tensor) -> Sequence[Tensor]:
        """The tensors that hold an activation's columns: one for each core of a CPU, one on other devices."""

    def join(self, logits: Tensor, stride: int, layout: StepLayout) -> Tensor:
        """(R * stride,): the logits in one tensor, as sampling reads them."""


class Sampling(Protocol):
    """What turns logits into tokens."""

    def sample(
        self,
        logits: Tensor,
        vocab_size: int,
        stride: int,
        inputs: Tensor,
        layout: StepLayout,
        out: Tensor | None = None,
        state: SamplingState | None = None,
    ) -> Tensor:
        """(R * OUT_WIDTH,) int32, written to the start of `out` if given. With `state`, logits are processed first."""


class Backend(Weights, Operations, Sampling, Protocol):
    """Everything that a model needs from a device: weights, operations and sampling."""


class DeviceSampling:
    """`Sampling` by kernels that every device has."""

    device: DeviceHandle

    def join(self, logits: Tensor, stride: int, layout: StepLayout) -> Tensor:
        return logits

    def sample(
        self,
        logits: Tensor,
        vocab_size: int,
        stride: int,
        inputs: Tensor,
        layout: StepLayout,
        out: Tensor | None = None,
        state: SamplingState | None = None,
    ) -> Tensor:
        logits = self.join(logits, stride, layout)
        spec = SampleSpec(layout, vocab_size, stride, self.device.has_threads, self.device.kind.safe_threads)
        if state is None:
            return sample(spec, logits, inputs, out)
        return sample_processed(spec, logits, inputs, state, out)


def stack_qkv(hosts: Sequence[HostMatrix]) -> list[HostMatrix]:
    """The rows of matrices with the same input in as few matrices as possible. Only the last may have rows that do not
    fill its panels, because those that pad a matrix follow it in the product: where another's would, all become
    float16, with a warning."""
    stacked = stack_rows(hosts)
    if all(part.shape[0] % PANEL == 0 for part in stacked[:-1]):
        return stacked
    logger.warning(
        "%s rows of q, k and v in %s are not multiples of %d, so they cannot be kept apart: all become float16",
        ", ".join(str(part.shape[0]) for part in stacked),
        ", ".join(_format_name(part) for part in stacked),
        PANEL,
    )
    return stack_rows([to_float16(part) for part in stacked])


def gate_over_up(gate: HostMatrix, up: HostMatrix) -> HostMatrix:
    """The gate's rows and then the up projection's, as one matrix, which one kernel reads. If their formats differ,
    both are kept in a common one; without one both become float16, with a warning."""
    stacked = stack_rows([gate, up])
    if len(stacked) > 1:
        stacked = stack_rows(in_common_format([gate, up]) or _as_float16(gate, up))
    return stacked[0]


def expert_gate_over_up(gate: HostMatrix, up: HostMatrix, num_experts: int) -> HostMatrix:
    """The same for many experts' (E * ffn, K): each expert's gate rows, and then its rows of the up projection."""
    size = gate.shape[0] // num_experts
    if isinstance(gate, np.ndarray) and isinstance(up, np.ndarray) and gate.dtype == up.dtype:  # copied once
        both = np.empty((num_experts, 2, size, gate.shape[1]), gate.dtype)
        halves = [half.reshape(num_experts, size, -1) for half in (gate, up)]
        copy_all([*both[:, 0], *both[:, 1]], [*halves[0], *halves[1]])
        return both.reshape(-1, gate.shape[1])
    index = np.arange(gate.shape[0]).reshape(num_experts, 1, size)
    return take_rows(gate_over_up(gate, up), np.concatenate([index, index + gate.shape[0]], axis=1).reshape(-1))


def _as_float16(gate: HostMatrix, up: HostMatrix) -> list[HostMatrix]:
    megabytes = 2 * (math.prod(gate.shape) + math.prod(up.shape)) / 1e6
    logger.warning(
        "gate in %s and up projection in %s have no common format: both become float16, %.1f MB",
        _format_name(gate),
        _format_name(up),
        megabytes,
    )
    return [to_float16(gate), to_float16(up)]


def _format_name(matrix: HostMatrix) -> str:
    return matrix.format.name if isinstance(matrix, QuantizedMatrix) else str(matrix.dtype)


__all__ = [
    "NO_STATES",
    "OUT_WIDTH",
    "PLAIN",
    "Backend",
    "DeviceSampling",
    "Epilogue",
    "KVPool",
    "Norm",
    "PoolGroup",
    "Step",
    "as_formats",
    "blocks_by_layer",
    "check_formats",
    "code_dtype",
    "expert_gate_over_up",
    "gate_over_up",
    "group_of",
    "pool_groups",
    "stack_qkv",
    "zeroed_plane",
    "zeroed_pool",
]
