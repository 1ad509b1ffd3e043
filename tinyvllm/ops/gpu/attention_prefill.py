"""Attention of steps with many rows on devices with matrix units: prompts, chunks of prompts, and decodes among them.

A threadgroup serves one KV head and a tile of consecutive tokens of one sequence; the tile's rows are its tokens times
the query heads that share the KV head, so keys and values are loaded once for all of them. It walks along the
sequence's context in tiles of keys, through the block table, with the online softmax of FlashAttention-2 (Dao 2023).

Which tokens make up a tile is computed on the device from the step's inputs (`tile_map_kernel`). A tile begins where a
sequence does, and at positions that are multiples of its size, so no tile mixes sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinygrad import Tensor, UOp

from tinyvllm.ops.attention_spec import KEYS, QUERIES, VALUES, AttentionLayer
from tinyvllm.ops.backend import Step
from tinyvllm.ops.gpu.attention_prefill_hopper import HopperTile
from tinyvllm.ops.gpu.attention_prefill_hopper_codes import UnpackingTile
from tinyvllm.ops.gpu.attention_prefill_inputs import Inputs, PrefillSpec
from tinyvllm.ops.gpu.attention_prefill_metal import MetalTile
from tinyvllm.ops.gpu.attention_prefill_tile import AttentionTile
from tinyvllm.ops.gpu.attention_rotate import rotate
from tinyvllm.ops.gpu.kv_codes import StoredHeads, store_run
from tinyvllm.ops.gpu.tile_map import tile_map, tile_order
from tinyvllm.ops.kernel.body import Body, KernelFn, cached_kernel, finish, run_kernel
from tinyvllm.ops.kernel.hopper import has_wgmma
from tinyvllm.ops.kernel.lanes import await_previous, axes_of, grid
from tinyvllm.ops.kernel.tiles import PIECE
from tinyvllm.ops.kernel.tuning import choose


def attend_tiles(
    spec: PrefillSpec,
    out: Tensor,
    pool: Sequence[Tensor],
    layer: AttentionLayer,
    step: Step,
    qkv: Sequence[Tensor],
) -> Tensor:
    """Write the rotated keys and the values to the pool, unless an earlier layer has, and attend. Writes and returns
    `out` (T, H * D)."""
    spec = choose(replace(spec, has_wgmma=has_wgmma(str(out.device))))
    if spec.uses_wgmma:
        sinks = [] if layer.sinks is None else [layer.sinks]
        queries, maps, pool = rotate(spec, pool, layer, step, qkv)
        tiles = tile_map(spec, step)
        read = [maps, tiles, tile_order(spec, tiles, step), step.inputs, *sinks, queries, *pool]
        return run_kernel(hopper_kernel(spec), [out], read)[0]
    if spec.writes_kv:
        pool = store_rows(spec, pool, layer, step, qkv)
    read = [*pool, tile_map(spec, step), step.inputs, *layer.tables, *[qkv[i] for i in spec.parts(QUERIES)]]
    return run_kernel(prefill_kernel(spec), [out], read)[0]


def store_rows(
    spec: PrefillSpec, pool: Sequence[Tensor], layer: AttentionLayer, step: Step, qkv: Sequence[Tensor]
) -> list[Tensor]:
    """The pool's planes with the keys and values of the step."""
    written = [step.inputs, *layer.key_tables, *[qkv[i] for i in spec.parts(KEYS, VALUES)]]
    return run_kernel(store_kernel(spec), list(pool), written)


@cached_kernel
def store_kernel(spec: PrefillSpec) -> KernelFn:
    """fn(*planes of the pool, inputs, *tables without sinks, *qkv[parts(1, 2)]): writes every row's rotated key and its
    value to the row's slot."""

    def kernel(*operands: UOp) -> UOp:
        body, half, rest = Body(), spec.head_dim // 2, list(operands)
        keys, values = StoredHeads.of(spec, spec.take_planes(rest), spec.lanes)
        step = Inputs(spec, rest.pop(0), rest, KEYS, VALUES)
        step.qkv = dict(zip(step.qkv, await_previous(spec.lanes, *step.qkv.values()), strict=True))
        per_row = spec.num_kv_heads * half // PIECE
        count, threads = spec.layout.num_tokens * per_row, 128
        group, thread = grid(body, -(-count // threads)), body.threads(threads)
        item = group * threads + thread
        is_inside = None if count % threads == 0 else item < count
        if is_inside is not None:
            item = is_inside.where(item, 0)
        row, head, dim = item // per_row, item % per_row // (half // PIECE), item % (half // PIECE) * PIECE
        slot, new = step.slot(row), [(keys, step.rotated(KEYS, row, head, dim)), (values, step.value(row, head, dim))]
        stores = [
            store
            for heads, runs in new
            for run, start in zip(runs, (dim, dim + half), strict=True)
            for store in store_run(spec.lanes, heads, slot, head, start, run, is_inside)
        ]
        tokens, width = spec.layout.num_tokens, spec.slot_elements
        name = f"store_kv_{tokens}x{width}"
        done = UOp.group(*stores).end(*reversed(axes_of(group, thread)))
        return finish(done, name, ops=6 * tokens * width, nbytes=12 * tokens * width)

    return kernel


@cached_kernel
def hopper_kernel(spec: PrefillSpec) -> KernelFn:
    """fn(out (T, H * D), maps, tiles, order, inputs, *sinks, queries, *planes of the pool). `maps` describe queries,
    and keys and values in float16; `order` is that of the tiles. Does not write rows of padding."""

    def kernel(out: UOp, maps: UOp, tiles: UOp, order: UOp, inputs: UOp, *operands: UOp) -> UOp:
        if spec.kv.is_quantized:
            count = len(operands) - spec.num_planes
            pool = StoredHeads.of(spec, spec.take_planes(list(operands[count:])), spec.lanes)
            tile: HopperTile = UnpackingTile(spec, pool, maps, tiles, order, inputs, operands[:count])
        else:
            tile = HopperTile(spec, maps, tiles, order, inputs, operands)
        done = tile.attend_and_store(out)
        return finish(done.end(*reversed(tile.axes)), _name(spec), **_work(spec))

    return kernel


def _name(spec: PrefillSpec) -> str:
    return f"prefill_attention_{spec.layout.num_tokens}x{spec.num_heads}x{spec.head_dim}"


def _work(spec: PrefillSpec) -> dict[str, int]:
    """The kernel's operations and bytes, at most."""
    tokens, context = spec.layout.num_tokens, spec.layout.max_blocks * spec.layout.block_size
    return {
        "ops": 4 * tokens * spec.num_heads * spec.head_dim * context,
        "nbytes": tokens * spec.kv.num_bytes(spec.slot_elements) * context // spec.tokens,
    }


@cached_kernel
def prefill_kernel(spec: PrefillSpec) -> KernelFn:
    """fn(out (T, H * D), *planes of the pool, tiles, inputs, *tables, *qkv[parts(0)]). Does not write rows of
    padding."""

    def kernel(out: UOp, *operands: UOp) -> UOp:
        rest = list(operands)
        pool = StoredHeads.of(spec, spec.take_planes(rest), spec.lanes)
        tiles, inputs, *rest = rest
        kind = AttentionTile if spec.tiles.is_cuda else MetalTile
        tile = kind(spec, pool, tiles, inputs, rest)
        totals, sums = tile.attend()
        stores = tile.stores(out, totals, sums)
        return finish(UOp.group(*stores).end(*reversed(tile.axes)), _name(spec), **_work(spec))

    return kernel
