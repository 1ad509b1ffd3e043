"""Decoding attention on devices with matrix units: RoPE, the KV write and flash-decoding in one kernel.

A threadgroup serves one token row, one KV head and one part of the context (Dao et al. 2023, "Flash-Decoding"); the
query heads that share the KV head are the rows of a matrix tile, so keys and values are loaded once for all of them,
straight into the fragments of the matrix unit. The row's own token is never read back: it is the first state of the
online softmax (Milakov & Gimelshein 2018). Only for rows that are the last token of a sequence of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from tinygrad import UOp, dtypes

from tinyvllm.ops.attention_spec import AttentionSpec
from tinyvllm.ops.gpu.attention_split import NOTHING, SHORTEST_SPAN, TILE_TOKENS, SplitHeads, arrive
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, balanced, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.lanes import (
    LANES,
    SHARED_BYTES,
    Lanes,
    Mma,
    await_previous,
    axes_of,
    carry,
    dot,
    grid,
    load_floats,
    warps,
)

MAX_GROUP = 8  # rows of a matrix tile
MAX_PARTS = 16
GROUPS_WANTED = 256  # threadgroups that fill a large GPU
FEW_GROUPS = 64  # threadgroups that leave half of a large GPU's cores idle: each takes more warps
LONG_CONTEXT = 2048  # tokens
RUN = 8  # consecutive dimensions of a lane


COVERED = ("a window", "a softcap", "biases", "no rope")  # of what AttentionSpec may ask for


@dataclass(frozen=True, kw_only=True)
class DecodeSpec(AttentionSpec):
    """Attention of rows that are each the last token of a sequence of its own."""

    lanes: Lanes
    mma: Mma
    qkv_parts: tuple[int, ...]  # partial sums of each part of qkv: (S, T, columns)

    def uncovered_shape(self) -> str:
        """Why `decode_kernel` does not serve it, in words; "" where it does."""
        if rest := self.uncovered(COVERED):
            return rest
        if self.head_dim not in (64, 128) or self.group > MAX_GROUP:
            return f"{self.num_heads} over {self.num_kv_heads} heads of {self.head_dim}"
        if self.layout.block_size % TILE_TOKENS:
            return f"blocks of {self.layout.block_size} tokens"
        return "" if self.holds_whole_sections() else "queries, keys and values that share a matrix in parts"

    @property
    def split(self) -> SplitHeads:
        """The context is shared out where the rows alone would leave most of the device idle: of several rows on CUDA,
        and where it may be long."""
        parts = MAX_PARTS
        if self.layout.num_tokens > 1:
            groups = self.layout.num_tokens * self.num_kv_heads
            while parts > 1 and parts * groups > GROUPS_WANTED:
                parts //= 2
            if self.lanes.kind != "CUDA" or not self.is_long:
                parts = 1
        return SplitHeads(self.layout, self.num_heads, self.head_dim, parts, self.window)

    @property
    def is_joined(self) -> bool:
        """Whether the last of the threadgroups that share a context makes their parts one."""
        return self.layout.num_tokens > 1 and self.split.num_parts > 1

    @property
    def num_warps(self) -> int:
        groups = self.layout.num_tokens * self.num_kv_heads
        if self.is_joined:
            wanted = 4
        elif self.split.num_parts > 1:
            wanted = SHORTEST_SPAN // TILE_TOKENS  # a short part is one pass
        else:
            wanted = 4 if groups > 256 else 16 if groups <= FEW_GROUPS and self.is_long else 8
        while wanted > 1 and wanted * self.group * (self.head_dim + 2) * 4 > SHARED_BYTES:
            wanted //= 2
        return wanted

    @property
    def tiles_ahead(self) -> int:
        """Tiles that a warp loads at once."""
        return 2 if self.head_dim <= 64 and (self.is_long or self.layout.num_tokens >= 32) else 1

    @property
    def is_long(self) -> bool:
        """Whether contexts may be long: what speeds these up costs a short one some tenths of a microsecond."""
        longest = self.layout.max_blocks * self.layout.block_size
        return min(longest, self.window or longest) >= LONG_CONTEXT


class _Row:
    """A token row and KV head inside the kernel: the lane's share of its query, key and value."""

    def __init__(self, spec: DecodeSpec, axis: UOp | int, kv_head: UOp | int, lane: UOp, operands: list[UOp]) -> None:
        self.spec, self.axis, self.kv_head, self.lane = spec, axis, kv_head, lane
        self.inputs, *rest = operands
        self.tables = spec.take_tables(rest, with_sinks=True)
        self.parts = rest  # to be read after `wait` alone
        layout = spec.layout
        limit = max(layout.max_blocks * layout.block_size, 4096)  # more than two passes of a loop: Body.fold_while
        self.past = clamp(self.inputs[layout.offset("positions") + axis].load(), 0, limit - 1)
        seq = clamp(self.inputs[layout.offset("seq_rows") + axis].load(), 0, layout.num_seqs)
        self.table = seq * layout.max_blocks + layout.offset("block_tables")
        slot = clamp(self.inputs[layout.offset("slots") + axis].load(), 0, spec.num_blocks * layout.block_size - 1)
        self.own = slot * spec.slot_elements + kv_head * spec.head_dim
        self.head = spec.mma.head(lane)
        self.column = spec.mma.column(lane)

    def wait(self, ahead: Sequence[UOp]) -> None:
        """Wait for the kernels before; what rotates, and `ahead`, is loaded meanwhile."""
        factors = []
        if self.tables.rope is not None:
            factors = [value for runs in self.query_dims for d in runs for pair in self.factors(d) for value in pair]
        self.parts = list(await_previous(self.spec.lanes, *self.parts, ahead=[*factors, *ahead]))

    def factors(self, dim: UOp) -> tuple[list[UOp], list[UOp]]:
        """Cosines and sines of dimensions [dim, dim + 8) at the row's position."""
        size, half = self.spec.head_dim, self.spec.head_dim // 2
        at = self.past * size + dim % half
        assert self.tables.rope is not None
        return load_floats(self.tables.rope, at, RUN), load_floats(self.tables.rope, at + half, RUN)

    def loaded(self, section: int, head: UOp | int, dim: UOp) -> list[UOp]:
        """Dimensions [dim, dim + 8) of a head of queries, keys or values, with their biases."""
        spec = self.spec
        start = spec.section_start(section)
        ends = list(accumulate(spec.qkv_cols))
        index = next(i for i, end in enumerate(ends) if end > start)
        cols = spec.qkv_cols[index]
        offset = start - (ends[index] - cols) + head * spec.head_dim + dim
        rows = [
            load_floats(self.parts[index], (self.axis + s * spec.layout.num_tokens) * cols + offset, RUN)
            for s in range(spec.qkv_parts[index])
        ]
        values = [balanced(column) for column in zip(*rows, strict=True)]
        if self.tables.bias is None:
            return values
        biases = load_floats(self.tables.bias, spec.bias_start(section) + head * spec.head_dim + dim, RUN)
        return [a + b for a, b in zip(values, biases, strict=True)]

    def rotated(self, section: int, head: UOp | int) -> list[list[list[UOp]]]:
        """The lane's runs (`query_dims`) of a head of queries or keys, normed where they are, and rotated by the row's
        position (half-split pairs, Su et al. 2021)."""
        scale = self._head_scale(section, head)
        return [[self._rotated_run(section, head, dim, scale) for dim in runs] for runs in self.query_dims]

    def _rotated_run(self, section: int, head: UOp | int, dim: UOp, scale: UOp | None) -> list[UOp]:
        size, half = self.spec.head_dim, self.spec.head_dim // 2
        if self.tables.rope is None:
            return self._normed(section, head, dim, scale)
        here, partner = (self._normed(section, head, d, scale) for d in (dim, (dim + half) % size))
        cos, sin = self.factors(dim)
        sign = (dim < half).where(UOp.const(-1.0, F32), UOp.const(1.0, F32))
        return [a * c + b * (s * sign) for a, b, c, s in zip(here, partner, cos, sin, strict=True)]

    def _normed(self, section: int, head: UOp | int, dim: UOp, scale: UOp | None) -> list[UOp]:
        values = self.loaded(section, head, dim)
        if self.tables.head_norm is None or scale is None:
            return values
        weights = load_floats(self.tables.head_norm, section * self.spec.head_dim + dim, RUN)
        return [v * scale * w for v, w in zip(values, weights, strict=True)]

    def _head_scale(self, section: int, head: UOp | int) -> UOp | None:
        """1 / sqrt(mean square + eps) of the lane's head, in each lane that holds some of it; None without a norm."""
        spec = self.spec
        if spec.head_eps is None:
            return None
        runs = [self.loaded(section, head, dim) for runs in self.query_dims for dim in runs]
        total = spec.lanes.sum(balanced(dot(run, run) for run in runs), spec.mma.row_masks)
        return (total * (1.0 / spec.head_dim) + spec.head_eps).sqrt().reciprocal()

    def weighed(self, tile: _Tile, token: UOp, product: UOp, high: UOp) -> UOp:
        """The score of a token of a tile whose part ends at `high`."""
        spec = self.spec
        is_seen = tile.is_used & (token < high)
        if spec.window is not None:
            is_seen = is_seen & (token >= spec.first_key(self.past))
        score = spec.score(product * spec.query_scale, lambda x: x.exp2())
        return is_seen.where(score, UOp.const(NOTHING, F32))

    @property
    def query_dims(self) -> list[list[UOp]]:
        """First dimensions of the lane's runs of its query head, by chunk and then by the runs of `Mma.token_runs`."""
        mma = self.spec.mma
        width = mma.slots * RUN
        return [
            [slot * RUN + c * width for _, slot in mma.token_runs(self.lane)]
            for c in range(self.spec.head_dim // width)
        ]

    @property
    def value_dims(self) -> list[UOp]:
        """First dimensions of the two runs of D / 8 that the lane's sums of values cover."""
        size = self.spec.head_dim // RUN
        return [(self.column + e) * size for e in range(2)]


@cached_kernel
def decode_kernel(spec: DecodeSpec) -> KernelFn:
    """fn(out (T, H * D), keys, values, inputs, *tables, *qkv), with a split context fn(values, sums, keys,
    ...), and where its parts are joined fn(out, values, sums, arrivals, keys, ...); `arrivals`: T * K counters, which
    are 0 before and after."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands, split, mma = list(rest), spec.split, spec.mma
        whole, part_values = out, operands.pop(0) if spec.is_joined else out
        sums = operands.pop(0) if split.num_parts > 1 else None
        arrivals = operands.pop(0) if spec.is_joined else None
        keys, values = operands.pop(0), operands.pop(0)
        body = Body()
        axis, kv_head = grid(body, spec.layout.num_tokens), grid(body, spec.num_kv_heads)
        part, lane, warp = grid(body, split.num_parts), body.threads(LANES), warps(body, spec.num_warps)
        axes = axes_of(axis, kv_head, part, lane, warp)
        row = _Row(spec, axis, kv_head, lane, operands)
        stored = keys.dtype

        span = split.span(split.shared(row.past))
        low = part * span if spec.window is None else part * span + split.start(row.past)
        high = (low + span).minimum(row.past) if split.num_parts > 1 else row.past
        per_pass = spec.num_warps * spec.tiles_ahead
        tiles = ((high - low).maximum(0) + (TILE_TOKENS - 1)) // TILE_TOKENS
        passes = (tiles + (per_pass - 1)) // per_pass

        def load(iteration: UOp | int) -> list[_Tile]:
            numbers = [(iteration * spec.tiles_ahead + i) * spec.num_warps + warp for i in range(spec.tiles_ahead)]
            return [_load_tile(row, keys, values, low + number * TILE_TOKENS, low, high) for number in numbers]

        # no kernel of this step writes the tokens before its own
        early = load(0) if spec.lanes.is_chained else []
        row.wait([value for tile in early for value in tile.loaded])
        early = [tile.or_zeros(low < high) for tile in early]

        query_head = kv_head * spec.group + row.head % spec.group
        query = [[[v.cast(mma.dtype) for v in run] for run in runs] for runs in row.rotated(0, query_head)]
        key = [[[v.cast(stored) for v in run] for run in runs] for runs in row.rotated(1, kv_head)]
        size = spec.head_dim // RUN
        value = [
            [v.cast(stored) for i in range(0, size, RUN) for v in row.loaded(2, kv_head, d + i)] for d in row.value_dims
        ]

        is_first = warp_is_first = UOp.const(True, dtypes.bool)
        if isinstance(warp, UOp):
            warp_is_first = warp.eq(0)
        is_first = warp_is_first & part.eq(0) if isinstance(part, UOp) else warp_is_first
        is_writer = is_first & row.head.eq(0)
        writes = [
            keys[(row.own + d + i).valid(is_writer)].store(v)
            for dims, runs in zip(row.query_dims, key, strict=True)
            for d, run in zip(dims, runs, strict=True)
            for i, v in enumerate(run)
        ] + [
            values[(row.own + d + i).valid(is_writer)].store(v)
            for d, run in zip(row.value_dims, value, strict=True)
            for i, v in enumerate(run)
        ]

        flat = lambda runs: [v.cast(F32) for chunk in runs for run in chunk for v in run]  # noqa: E731
        own_product = spec.lanes.sum(dot(flat(query), flat(key)), mma.row_masks)
        own_score = spec.score(own_product * spec.query_scale, lambda x: x.exp2())
        zero, one, nothing = (UOp.const(v, F32) for v in (0.0, 1.0, NOTHING))
        leads = row.column.eq(0)  # one lane a head counts the own token, and publishes the head's maximum and sum
        init = [
            is_first.where(own_score, nothing),
            (is_first & leads).where(one, zero),
            *[is_first.where(run[i].cast(F32), zero) for i in range(size) for run in value],
        ]

        def step(tiles: list[_Tile], old: list[UOp]) -> list[UOp]:
            best, total, acc = old[0], old[1], old[2:]
            scores = []  # of two tokens each, by tile and then by 8 tokens
            for tile in tiles:
                for n in range(2):
                    pair = _score(spec, query, tile.keys[n])
                    tokens = [tile.first + n * 8 + row.column + e for e in range(2)]
                    scores.append([row.weighed(tile, t, v, high) for t, v in zip(tokens, pair, strict=True)])
            top = balanced([v for pair in scores for v in pair], lambda a, b: a.maximum(b))
            new_best = best.maximum(spec.lanes.maximum(top, mma.row_masks))
            decay = (best - new_best).exp2()
            weights = [[(v > NOTHING / 10).where((v - new_best).exp2(), zero) for v in pair] for pair in scores]
            new_total = total * decay + balanced([w for pair in weights for w in pair])
            halves = [[w.cast(mma.dtype) for w in pair] for pair in weights]
            new = []
            for j in range(size):
                sums = [acc[j * 2] * decay, acc[j * 2 + 1] * decay]
                for i, tile in enumerate(tiles):
                    sums = _add_values(spec, halves[2 * i : 2 * i + 2], [run[j] for run in tile.values], sums)
                new += sums
            return [new_best, new_total, *new]

        if early:
            init, passes = step(early, init), (passes - 1).maximum(0)
        skipped = int(bool(early))
        best, total, *acc = carry(body, init, passes, axes, lambda i, old: step(load(i + skipped), old))
        total = spec.lanes.sum(total, mma.row_masks)
        places = (axis, kv_head, part, lane, warp)
        joining = None if arrivals is None else _Joining(whole, arrivals, split.used(split.shared(row.past)))
        stores = _combine_warps(body, spec, part_values, sums, joining, places, row, best, total, acc)
        tokens, context = spec.layout.num_tokens, spec.layout.max_blocks * spec.layout.block_size
        return finish(
            UOp.group(*writes, *stores).end(*reversed(axes)),
            f"decode_attention_{tokens}x{spec.num_heads}x{spec.head_dim}",
            ops=4 * tokens * spec.num_heads * spec.head_dim * context,
            nbytes=4 * tokens * spec.slot_elements * context,
        )

    return kernel


@dataclass(frozen=True)
class _Tile:
    """The lane's fragments of 16 tokens from `first` on."""

    first: UOp
    is_used: UOp  # whether the tile begins before the part's end; if not, it is of other tokens of the context
    keys: list[list[list[list[UOp]]]]  # by 8 tokens and then by runs
    values: list[list[UOp]]  # by token

    @property
    def loaded(self) -> list[UOp]:
        keys = [value for half in self.keys for chunk in half for run in chunk for value in run]
        return keys + [value for run in self.values for value in run]

    def or_zeros(self, has_tokens: UOp) -> _Tile:
        """The tile; where its part has no tokens, of values that are numbers."""
        return replace(self, values=[[has_tokens.where(v, v.const_like(0.0)) for v in run] for run in self.values])


def _load_tile(row: _Row, keys: UOp, values: UOp, wanted: UOp, low: UOp | int, high: UOp) -> _Tile:
    """The tile that begins at token `wanted` of the part [low, high), which may be empty."""
    is_used = wanted < high
    first = is_used.where(wanted, low.minimum((high - 1).maximum(0)) if isinstance(low, UOp) else low)
    spec, lane, mma = row.spec, row.lane, row.spec.mma
    size = spec.layout.block_size
    block = clamp(row.inputs[row.table + first // size].load(), 0, spec.num_blocks - 1)
    base = (block * size + first % size) * spec.slot_elements + row.kv_head * spec.head_dim
    load = lambda buffer, at, count: [buffer[at + i].load().cast(mma.dtype) for i in range(count)]  # noqa: E731
    width = mma.slots * RUN
    if mma.kind == "CUDA":
        key_runs = [(lane // 4, lane % 4)]
        value_tokens = [lane % 4 * 2 + a + 8 * h for h in range(2) for a in range(2)]
        value_dims = [lane // 4 * (spec.head_dim // RUN)] * 4
    else:
        key_runs = mma.row_runs(lane)
        value_tokens = [row.head, row.head, row.head + 8, row.head + 8]
        value_dims = [*row.value_dims, *row.value_dims]

    def chunk(n: int, c: int) -> list[list[UOp]]:
        starts = [base + (n * 8 + token) * spec.slot_elements + slot * RUN + c * width for token, slot in key_runs]
        return [load(keys, start, RUN) for start in starts]

    fragments = [[chunk(n, c) for c in range(spec.head_dim // width)] for n in range(2)]
    # what lies behind the part is what another sequence left, be it NaN: its weight 0 must meet a number
    last = (high - 1 - first).maximum(0)
    loaded = [
        load(values, base + token.minimum(last) * spec.slot_elements + dim, spec.head_dim // RUN)
        for token, dim in zip(value_tokens, value_dims, strict=True)
    ]
    return _Tile(first, is_used, fragments, loaded)


def _score(spec: DecodeSpec, query: list[list[list[UOp]]], keys: list[list[list[UOp]]]) -> list[UOp]:
    """q . k of the lane's head and two tokens of the eight."""
    mma = spec.mma
    sums = UOp.stack(*[UOp.const(0.0, F32)] * mma.elements)
    zero = UOp.const(0.0, mma.dtype)
    for q, k in zip(query, keys, strict=True):
        if mma.kind == "METAL":
            for i in range(RUN):
                sums = mma.tile((q[0][i], q[1][i]), (k[0][i], k[1][i]), sums)
        else:  # heads fill half of a tile's 16 rows
            for i in range(0, RUN, 4):
                left = (*q[0][i : i + 2], zero, zero, *q[0][i + 2 : i + 4], zero, zero)
                sums = mma.tile(left, k[0][i : i + 4], sums)
    return [sums.index(e) for e in range(2)]


def _add_values(spec: DecodeSpec, weights: list[list[UOp]], values: list[UOp], sums: list[UOp]) -> list[UOp]:
    """sums + weights (8 heads x 16 tokens) @ values. The layout of the scores is that of the operand."""
    mma = spec.mma
    zero = UOp.const(0.0, mma.dtype)
    if mma.kind == "METAL":
        acc = UOp.stack(*sums)
        for n in range(2):
            acc = mma.tile(weights[n], values[2 * n : 2 * n + 2], acc)
    else:
        left = (*weights[0], zero, zero, *weights[1], zero, zero)
        acc = mma.tile(left, values, UOp.stack(*sums, *[UOp.const(0.0, F32)] * 2))
    return [acc.index(e) for e in range(2)]


@dataclass(frozen=True)
class _Joining:
    """What the threadgroups that share a row's context need besides its parts."""

    out: UOp
    arrivals: UOp
    used: UOp  # parts in use


def _combine_warps(
    body: Body,
    spec: DecodeSpec,
    out: UOp,
    sums: UOp | None,
    joining: _Joining | None,
    axes: tuple[UOp | int, UOp | int, UOp | int, UOp, UOp | int],
    row: _Row,
    best: UOp,
    total: UOp,
    acc: list[UOp],
) -> list[UOp]:
    """The warps' softmaxes as one, through threadgroup memory."""
    axis, kv_head, part, lane, warp = axes
    count, group, dim = spec.num_warps, spec.group, spec.head_dim
    shared, scales = body.shared(count * group * dim), body.shared(count * group * 2)
    is_real = row.head < group
    leads = is_real & row.column.eq(0)
    at = warp * group + row.head
    stores = [
        shared[(at * dim + d + j).valid(is_real)].store(acc[j * 2 + e])
        for e, d in enumerate(row.value_dims)
        for j in range(dim // RUN)
    ]
    stores += [scales[(at * 2).valid(leads)].store(best), scales[(at * 2 + 1).valid(leads)].store(total)]
    done = UOp.group(*stores)
    shared, scales = shared.after(done), scales.after(done)
    width, tokens = spec.num_heads * dim, spec.layout.num_tokens
    results = []
    for index, is_inside in _elements(spec, warp * LANES + lane):
        head = index // dim
        bests = [scales[(w * group + head) * 2].load() for w in range(count)]
        top = balanced(bests, lambda a, b: a.maximum(b))
        factors = [(b - top).exp2() for b in bests]
        whole = balanced(f * scales[(w * group + head) * 2 + 1].load() for w, f in enumerate(factors))
        value = balanced(f * shared[w * group * dim + index].load() for w, f in enumerate(factors))
        target = axis * width + kv_head * (group * dim) + index
        if sums is None:
            results.append(out[_gate(target, is_inside)].store((value / whole).cast(out.dtype)))
            continue
        safe, is_part = (whole > 0.0).where(whole, 1.0), None
        if joining is not None:
            alone = part.eq(0) & joining.used.eq(1) if isinstance(part, UOp) else None
            results.append(joining.out[_gate(target, is_inside, alone)].store((value / safe).cast(joining.out.dtype)))
            is_part = (joining.used > 1) & (part < joining.used)
        lse = (whole > 0.0).where(top + safe.log2(), NOTHING)
        place = (part * tokens + axis) * spec.num_heads + kv_head * group + head
        results.append(out[_gate(part * (tokens * width) + target, is_inside, is_part)].store(value / safe))
        results.append(sums[_gate(place, is_inside, is_part, (index % dim).eq(0))].store(lse))
    if joining is None or sums is None:
        return results
    return _join_parts(body, spec, out, sums, joining, axes, results)


def _elements(spec: DecodeSpec, thread: UOp) -> list[tuple[UOp, UOp | None]]:
    """The elements of a KV head's group of heads that a thread writes, and whether there is one."""
    size, threads = spec.group * spec.head_dim, spec.num_warps * LANES
    elements: list[tuple[UOp, UOp | None]] = []
    for start in range(0, size, threads):
        index, is_inside = start + thread, start + thread < size
        is_whole = start + threads <= size
        elements.append((index, None) if is_whole else (is_inside.where(index, 0), is_inside))
    return elements


def _gate(at: UOp, *conditions: UOp | None) -> UOp:
    for condition in conditions:
        at = at if condition is None else at.valid(condition)
    return at


def _join_parts(
    body: Body,
    spec: DecodeSpec,
    values: UOp,
    sums: UOp,
    joining: _Joining,
    axes: tuple[UOp | int, UOp | int, UOp | int, UOp, UOp | int],
    stores: list[UOp],
) -> list[UOp]:
    """The last threadgroup of a row's makes its parts one, and sets the counter back."""
    axis, kv_head, part, lane, warp = axes
    group, dim, tokens = spec.group, spec.head_dim, spec.layout.num_tokens
    thread, counter = warp * LANES + lane, axis * spec.num_kv_heads + kv_head
    is_shared = (joining.used > 1) & (part < joining.used)
    is_last, seen = arrive(body, joining.arrivals, counter, is_shared, joining.used, *stores)
    values, sums = values.after(seen), sums.after(seen)
    elements = _elements(spec, thread)
    outer = axes_of(axis, kv_head, part, lane, warp)

    def step(number: UOp | int, old: list[UOp]) -> list[UOp]:
        new = []
        for i, (index, _) in enumerate(elements):
            best, total, acc = old[3 * i : 3 * i + 3]
            place = (number * tokens + axis) * spec.num_heads + kv_head * group
            here = sums[place + index // dim].load()
            top = best.maximum(here)
            before, now = (best - top).exp2(), (here - top).exp2()
            new += [top, total * before + now, acc * before + now * values[place * dim + index].load()]
        return new

    init = [UOp.const(v, F32) for _ in elements for v in (NOTHING, 0.0, 0.0)]
    count = is_last.where(joining.used, 0)
    sums_up = carry(body, init, count, outer, step)
    results = list(stores)
    for i, (index, is_inside) in enumerate(elements):
        _, total, acc = sums_up[3 * i : 3 * i + 3]
        at = _gate((axis * spec.num_kv_heads + kv_head) * (group * dim) + index, is_inside, is_last)
        results.append(joining.out[at].store((acc / total).cast(joining.out.dtype)))
    zero = UOp.const(0, joining.arrivals.dtype)
    return [*results, joining.arrivals.after(seen)[_gate(counter + 0 * thread, is_last, thread.eq(0))].store(zero)]
