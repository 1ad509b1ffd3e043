"""The kernels of a step of several rows on METAL, counted without the device and without weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType, _from_np_dtype

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.weights.random import RANDOM_KINDS, RandomWeights
from tinyvllm.ops.attention_spec import QUERIES, AttentionLayer
from tinyvllm.ops.formats.matrix import planes_of
from tinyvllm.ops.formats.runs import covers
from tinyvllm.ops.gpu.attention_prefill import prefill_kernel
from tinyvllm.ops.gpu.attention_prefill_inputs import PrefillSpec
from tinyvllm.ops.gpu.gemm import GemmSpec, gemm_kernel
from tinyvllm.ops.kernel.body import F16, F32, I32
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.metal_counts import MetalCounts, count_kernel
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.profiling.apple import CountedKernel, issue_cycles
from tinyvllm.profiling.roofline import attended_keys, operations_a_key

LANES = Lanes("METAL", (dtypes.half, dtypes.bfloat16))
BLOCK_SIZE = 16
COUNTED_TOKENS, TOKEN_TILE = 512, 64  # of the kernels of prompts that are counted; others have more or fewer tiles
SMALL = (32, 256)  # of a matrix whose planes stand for larger ones
UNKNOWN_KIND = "Q4_K"  # stands for quantized formats that random weights do not have


def count_prompt(config: ModelConfig, kind: str, num_tokens: int) -> list[CountedKernel]:
    """The products and the attention of a step with a prompt of `num_tokens`, weights of `kind`. Experts, recurrent
    layers and latents are left out."""
    return [*count_products(config, kind, num_tokens), *count_attention(config, num_tokens)]


def counts_all(config: ModelConfig) -> bool:
    """Whether `count_products` counts all products of a step: there are no experts, whose tiles are mostly padding,
    and no recurrent layers or latents."""
    are_plain = all(layer.state is None and layer.latent is None for layer in config.layers)
    return are_plain and not config.sparse_layers


def count_products(config: ModelConfig, kind: str, num_tokens: int) -> list[CountedKernel]:
    """Products of at least two rows, gated ones and others: of each the largest is counted, and the rest differ in
    sizes. Not those that `counts_all` names."""
    kind, shapes, found = _covered(kind.partition(",")[0]), _shapes(config), []
    for is_gated in (True, False):
        alike = {shape: count for shape, count in shapes.items() if (shape[0] == "gate_up") is is_gated}
        if not alike:
            continue
        _, rows, cols = max(alike, key=lambda shape: shape[1] * shape[2])
        counted = num_tokens if num_tokens <= TOKEN_TILE else COUNTED_TOKENS
        counts = _count_product(kind, counted, rows, cols, is_gated)
        weights = sum(rows * cols * count for (_, rows, cols), count in alike.items())
        tiles = -(-num_tokens // TOKEN_TILE) / -(-counted // TOKEN_TILE)
        times = counts.simdgroups * counts.groups * tiles * weights / (rows * cols)
        serial, parallel = issue_cycles(counts)
        names = ", ".join(dict.fromkeys(name for name, _, _ in alike))
        found.append(CountedKernel(names, 2.0 * num_tokens * weights, 1, (serial * times, parallel * times), counts))
    return found


def count_attention(config: ModelConfig, num_tokens: int) -> list[CountedKernel]:
    """Attention, by kind of layer."""
    counts = Counter(layer for layer in config.layers if layer.state is None and layer.latent is None)
    found = [(_attention(layer, num_tokens), count) for layer, count in counts.items()]
    return [replace(kernel, launches=count) for kernel, count in found if kernel is not None]


def _shapes(config: ModelConfig) -> Counter[tuple[str, int, int]]:
    """How often each product runs in a step: (name, rows, columns)."""
    shapes: Counter[tuple[str, int, int]] = Counter()
    for layer in config.layers:
        if layer.state is not None or layer.latent is not None:
            continue
        shapes["qkv", layer.q_size + 2 * layer.kv_size, config.hidden_size] += 1
        shapes["attention_out", config.hidden_size, layer.q_size] += 1
    for size in config.dense_sizes:
        if size:
            shapes["gate_up", 2 * size, config.hidden_size] += 1
            shapes["down", config.hidden_size, size] += 1
    return shapes


def _covered(kind: str) -> str:
    """The kind itself, or one that stands for it."""
    if kind not in RANDOM_KINDS:
        return UNKNOWN_KIND
    fmt, _ = planes_of(RandomWeights(kind, 0).take("matrix", SMALL), "row")
    return kind if fmt.grid is None and covers(fmt) else UNKNOWN_KIND


@cache
def _count_product(kind: str, num_tokens: int, rows: int, cols: int, is_gated: bool) -> MetalCounts:
    """A product of `num_tokens` rows."""
    fmt, planes = planes_of(RandomWeights(kind, 0).take("matrix", SMALL), "row")
    is_bfloat = kind == "bfloat16"
    mma, x_dtype = (
        Mma("METAL", dtypes.bfloat16 if is_bfloat else dtypes.half),
        F32 if is_bfloat and not is_gated else F16,
    )
    name, activation = ("gate_up", "silu") if is_gated else ("down", None)
    spec = GemmSpec(name, mma, fmt, x_dtype, num_tokens, rows, cols, activation)
    adds = not is_gated and spec.splits == 1
    spec = replace(spec, adds_residual=adds)
    size = num_tokens * spec.out_rows
    sizes = [(spec.splits * size, F16 if adds or is_gated else F32)]
    sizes += [(plane.size * rows * cols // math.prod(SMALL), _from_np_dtype(plane.dtype)) for plane in planes]
    sizes += [(num_tokens * cols, x_dtype), *([(size, F16)] if adds else [])]
    return count_kernel(gemm_kernel(spec)(*_placeholders(sizes)))[0]


def _attention(layer: LayerKind, num_tokens: int) -> CountedKernel | None:
    """None if the general kernels compute it."""
    plain = replace(layer, head_norm_eps=None, value_norm_eps=None, has_bias=False, has_sinks=False, kv_layer=None)
    counted = _count_attention(replace(plain, query_scaling=None))
    if counted is None:
        return None
    spec, once, twice = counted
    lasts = [min(first + spec.tokens, num_tokens) for first in range(0, num_tokens, spec.tokens)]
    most = num_tokens if layer.window is None else layer.window + spec.tokens
    tiles = [-(-min(last, most) // spec.keys) for last in lasts]
    # every loop over tiles of keys runs once, or twice: with two loops, half of the difference is one tile's
    loops, cycles = 1 if spec.window is not None else 2, []
    for at_once, at_twice in zip(issue_cycles(once), issue_cycles(twice), strict=True):
        a_tile = (at_twice - at_once) / loops
        of_all = sum(at_once - loops * a_tile + a_tile * count for count in tiles)
        cycles.append(of_all * once.simdgroups * layer.num_kv_heads)
    flops = operations_a_key(layer) * attended_keys(0, num_tokens, layer.window)
    return CountedKernel(
        f"attention, heads of {layer.head_dim}", flops, 1, (cycles[0], cycles[1]), once, is_attention=True
    )


@cache
def _count_attention(layer: LayerKind) -> tuple[PrefillSpec, MetalCounts, MetalCounts] | None:
    """(the spec for COUNTED_TOKENS rows, its counts where every loop over keys runs once, and twice)."""
    tokens, cols = COUNTED_TOKENS, layer.q_size + 2 * layer.kv_size
    layout = StepLayout(tokens, 1, tokens // BLOCK_SIZE, BLOCK_SIZE)
    rope = Tensor.empty(tokens * layer.head_dim, dtype=F32, device="CPU") if layer.rope else None
    stands, mma = AttentionLayer(0, layer, (cols,), rope=rope), Mma("METAL", dtypes.half)
    spec = PrefillSpec.of(stands, layout, layout.max_blocks, lanes=LANES, mma=mma, qkv_partials=(1,))
    if spec.uncovered_shape():
        return None
    pool = (layout.max_blocks * BLOCK_SIZE * spec.slot_elements, F16)
    sizes = [(tokens * layer.q_size, F16), pool, pool, (spec.map_size + 1, I32), (layout.size, I32)]
    sizes += [(tokens * spec.rope_cols, F32)] if layer.rope else []
    sizes += [(tokens * cols, F32) for _ in spec.parts(QUERIES)]
    once, twice = count_kernel(prefill_kernel(spec)(*_placeholders(sizes)), 1, 2)
    return spec, once, twice


def _placeholders(sizes: Sequence[tuple[int, DType]]) -> list[UOp]:
    return [UOp.placeholder((size,), dtype, slot) for slot, (size, dtype) in enumerate(sizes)]
