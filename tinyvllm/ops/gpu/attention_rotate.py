"""A step's queries, keys and values, rotated and where Hopper's copy engine fetches them: the first of two kernels."""

from __future__ import annotations

from collections.abc import Sequence

from tinygrad import Tensor, UOp

from tinyvllm.ops.attention_spec import KEYS, QUERIES, VALUES, AttentionLayer
from tinyvllm.ops.backend import Step
from tinyvllm.ops.gpu.attention_prefill_inputs import Inputs, PrefillSpec
from tinyvllm.ops.gpu.kv_codes import StoredHeads, store_run
from tinyvllm.ops.kernel.body import F16, U32, Body, KernelFn, cached_kernel, empty, finish, run_kernel
from tinyvllm.ops.kernel.hopper import MAP_WORDS, declare, describe
from tinyvllm.ops.kernel.lanes import LANES, await_previous, axes_of, grid
from tinyvllm.ops.kernel.tiles import PIECE, store_values, together

QUERY_MAP, KEY_MAP, VALUE_MAP = range(3)  # in the buffer of tensor maps
NUM_WARPS = 8

Pool = Sequence[Tensor]  # a layer's keys and values


def rotate(
    spec: PrefillSpec, pool: Pool, layer: AttentionLayer, step: Step, qkv: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Pool]:
    """(queries (T, H, D), tensor maps of these and the pool, the pool): see `rotate_kernel`."""
    device, width = str(step.inputs.device), spec.num_heads * spec.head_dim
    written = [empty(step.num_tokens * width, F16, device), empty(spec.map_words, U32, device)]
    read = [step.inputs, *layer.key_tables, *[qkv[i] for i in spec.parts(*_sections(spec))]]
    if not spec.writes_kv:
        described = [] if spec.kv.is_quantized else pool
        queries, maps = run_kernel(rotate_kernel(spec), written, [*described, *read])
        return queries, maps, pool
    queries, maps, *planes = run_kernel(rotate_kernel(spec), [*written, *pool], read)
    return queries, maps, planes


def _sections(spec: PrefillSpec) -> tuple[int, ...]:
    return (QUERIES, KEYS, VALUES) if spec.writes_kv else (QUERIES,)


@cached_kernel
def rotate_kernel(spec: PrefillSpec) -> KernelFn:
    """fn(queries (T, H, D), maps (3 * MAP_WORDS,), *planes of the pool, inputs, *tables without sinks, *qkv): writes
    every row's rotated and scaled queries, and to the row's slot its rotated key and its value, unless an earlier layer
    has; and describes queries, and keys and values in float16, to the copy engine."""

    def kernel(queries: UOp, maps: UOp, *operands: UOp) -> UOp:
        body, half, rest = Body(), spec.head_dim // 2, list(operands)
        has_pool = spec.writes_kv or not spec.kv.is_quantized
        heads = StoredHeads.of(spec, spec.take_planes(rest), spec.lanes) if has_pool else ()
        step = Inputs(spec, rest.pop(0), rest, *_sections(spec))
        step.qkv = dict(zip(step.qkv, await_previous(spec.lanes, *step.qkv.values()), strict=True))
        per_head, tokens = half // PIECE, spec.layout.num_tokens
        group = grid(body, -(-tokens * spec.num_heads * per_head // (NUM_WARPS * LANES)))
        lane, warp = body.threads(LANES), body.threads(NUM_WARPS)
        item = group * (NUM_WARPS * LANES) + warp * LANES + lane

        def place(heads: int) -> tuple[UOp, UOp, UOp, UOp]:
            """The thread's (row, head, first of eight dimensions, whether there is such a head) of so many heads."""
            count = tokens * heads * per_head
            number = item.minimum(count - 1)
            return number // (heads * per_head), number // per_head % heads, number % per_head * PIECE, item < count

        row, head, dim, is_one = place(spec.num_heads)
        assert step.tables is not None
        scale = spec.query_scale_at(step.tables.rope, step.position(row))
        scaled = [[value * scale for value in run] for run in step.rotated(QUERIES, row, head, dim)]
        at = (row * spec.num_heads + head) * spec.head_dim + dim
        stores = [one for i, run in enumerate(scaled) for one in store_values(queries, at + i * half, run, is_one)]
        if spec.writes_kv:  # in threads that have queries, too: a kernel of their own would cost more
            row, head, dim, is_one = place(spec.num_kv_heads)
            slot = step.slot(row)
            new = (step.rotated(KEYS, row, head, dim), step.value(row, head, dim))
            for stored, runs in zip(heads, new, strict=True):
                for run, start in zip(runs, (dim, dim + half), strict=True):
                    stores += store_run(spec.lanes, stored, slot, head, start, run, is_one)
        matrices = [queries, *[stored.codes for stored in heads if not spec.kv.is_quantized]]
        described = _describe(spec, maps, matrices, group, warp, lane)
        width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        done = together(*stores, described).end(*reversed(axes_of(group, lane, warp)))
        return finish(done, f"rotate_{tokens}x{width}", ops=6 * tokens * width, nbytes=6 * tokens * width)

    return kernel


def _describe(spec: PrefillSpec, maps: UOp, matrices: Sequence[UOp], group: UOp | int, warp: UOp, lane: UOp) -> UOp:
    """Write the tensor maps of the queries, and perhaps of keys and values."""
    is_first = warp < len(matrices)
    if isinstance(group, UOp):
        is_first = is_first & group.eq(0)
    # cleared, so that tinygrad sees a write: it does not see those of our own statements
    maps = maps.after(maps[(warp * MAP_WORDS + lane).valid(is_first)].store(UOp.const(0, U32)))
    last = declare(len(matrices) * MAP_WORDS * 4)
    for i, (matrix, box) in enumerate(zip(matrices, (spec.query_box, spec.pool_box, spec.pool_box), strict=False)):
        last = describe(i, i * MAP_WORDS * 4, maps[i * MAP_WORDS], matrix[0], box, last, by_first=True)
    return last
