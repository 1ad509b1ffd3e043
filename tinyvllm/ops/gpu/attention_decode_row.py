"""The inside of the decode kernel: its spec, a thread's place in it, and one token row's query, key and value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType

from tinyvllm.config import KVFormat
from tinyvllm.ops.attention_spec import VALUES
from tinyvllm.ops.gpu.attention_fused import RUN, FusedAttentionSpec
from tinyvllm.ops.gpu.attention_split import SHORTEST_SPAN, TILE_TOKENS, SplitHeads
from tinyvllm.ops.gpu.kv_codes import StoredHeads
from tinyvllm.ops.kernel.body import Body, balanced, clamp
from tinyvllm.ops.kernel.hopper import MULTIPROCESSORS
from tinyvllm.ops.kernel.lanes import (
    LANES,
    METAL_WARPS,
    SHARED_BYTES,
    await_previous,
    axes_of,
    dot,
    grid,
    hold,
    load_floats,
    warps,
)
from tinyvllm.ops.kernel.tiles import quick_exp2, quick_maximum
from tinyvllm.ops.kernel.tuning import Tunable

MAX_SPLITS = 16
GROUPS_WANTED = 256  # threadgroups that fill a large GPU
# Threadgroups of float16 up to which a warp fetches its next tile ahead: with more, an H200 is faster with more of them
# at a time, or, from so many on, with those that stream (attention_decode_hopper.py)
GROUPS_AHEAD = 512
RESIDENT_WARPS = MULTIPROCESSORS * 10  # that the registers of a large GPU hold
LONG_CONTEXT = 2048  # tokens
FEW_ROWS = 8  # of steps that have graphs of their own for short contexts
TILE_HEADS = 8  # query heads that are rows of a matrix tile
WIDE_HEAD = 256  # dimensions of heads of which a lane's registers do not hold keys and values of a tile at once
CUDA_SHARED_BYTES = 48 << 10
PARTIALS_AT_ONCE = 2  # partial sums of qkv that a lane of METAL's loads before it adds them up
STATE_GAP = 4  # numbers between spans of a warp's state in threadgroup memory
GROUP = 32  # dimensions that share a scale where keys or values are quantized

Runs = list[list[list[UOp]]]  # a lane's values of one head: by chunk of the matrix unit, run, and dimension in the run


def short_contexts(num_rows: int, verifies: bool, longest: int) -> tuple[int, ...]:
    """`Operations.short_contexts` on CUDA, with `longest` for one row where longer contexts have another kernel. Below
    LONG_CONTEXT nothing is fetched ahead, and a row's context has as many splits as it may need, so that none are idle.
    (H200, us of steps that serve contexts of 8,192: 8B in Q4_K with 8 layers at 128, 500 and 1,000 tokens 394.5, 408.0,
    411.6, and in these graphs 383.2, 394.3, 402.0; 1B in Q4_0 342.6, 363.8, 368.8, and 330.8, 345.4, 355.0; 5 rows with
    drafts, 6 layers of 8B, 519.2, 547.9, 548.5, and 481.5, 501.2, 535.4. 8 rows that decode, 6 layers of 8B at 100 and
    250 tokens, 479.4, 490.8, and 467.6, 478.7; with 500 they would gain nothing, and 1B's lose 4 %.)"""
    if num_rows > FEW_ROWS:
        return ()
    if verifies:
        return (1024,)
    return tuple(limit for limit in (512, 1024, longest) if limit) if num_rows == 1 else (256,)


@dataclass(frozen=True, kw_only=True)
class DecodeSpec(FusedAttentionSpec, Tunable):
    """Attention row by row: of rows that are each the last token of a sequence of its own, or whose keys and values are
    all in the pool."""

    reads_own: bool = False  # the step's keys and values were written before: rows attend to other rows of the step

    @property
    def adds_own(self) -> bool:
        """Whether the kernel computes the row's own key and value, and writes them."""
        return self.writes_kv and not self.reads_own

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        knobs: dict[str, tuple[int, ...]] = {"num_warps": (1, 2, 4, 8, 16), "tiles_ahead": (1, 2)}
        if self.lanes.kind == "CUDA" and (self.is_long or self.layout.num_tokens == 1):
            knobs["num_splits"] = (1, 2, 4, 8, 16, 32)
        if self.stages_heads and not self.is_wide:
            knobs["fetches_ahead"] = (0, 1)
        if self.packs(self.kv.keys) or self.packs(self.kv.values):
            knobs |= {"resident": (0, 2, 3, 4), "early": (0, 1), "fetches_ahead": (0, 1)}
            knobs["num_warps"] = (1, 2, 4, 6, 8, 16)
        return knobs

    def is_possible(self) -> bool:
        is_shared = self.combines_splits  # whose counters are as many as the groups that the rules split
        return (
            self.shared_bytes <= self.lanes.shared_bytes
            and not (is_shared and self.layout.num_tokens * self.head_groups > GROUPS_WANTED)
            and not (self.is_wide and self.tiles_ahead > 1)
        )

    @property
    def head_dims(self) -> tuple[int, ...]:
        return (64, 80, 96, 128, 256)

    @property
    def tile_heads(self) -> int:
        """Query heads that a threadgroup serves: all that share a KV head, or an equal part of them if these are more
        than a tile has rows."""
        return next(count for count in range(TILE_HEADS, 0, -1) if self.group % count == 0)

    @property
    def head_groups(self) -> int:
        """Threadgroups of a row without splits."""
        return self.num_heads // self.tile_heads

    @property
    def chunk_dims(self) -> int:
        """Dimensions of a chunk of the matrix unit. The last chunk of a head may have fewer."""
        return self.mma.slots * RUN

    @property
    def chunks(self) -> int:
        return -(-self.head_dim // self.chunk_dims)

    # -- dimensions in the order of codes (attention_decode_codes.py) --------------------------------------------------

    def packs(self, form: KVFormat) -> bool:
        """Whether numbers are codes, of which words are made."""
        return form.is_quantized and self.mma.kind == "CUDA"

    def in_words(self, form: KVFormat) -> bool:
        """Whether operands are made of words of two numbers, which inline PTX multiplies."""
        return self.packs(form) or self.stages_heads

    @property
    def stages_heads(self) -> bool:
        """Whether a threadgroup's threads share the work for the row's own heads (attention_decode_stage.py): if keys
        and values are float16 of which a lane can load 16 bytes at once. (NVIDIA H200, a step of 8 layers of
        Llama-3.1-8B in Q4_K, one row: 384 us, and 379. gemma-3-4b, 7 layers, whose heads have 256 dimensions: 349 us,
        and 285.)"""
        is_float16 = self.mma.kind == "CUDA" and not self.kv.is_quantized
        return is_float16 and self.head_dim % (RUN * RUN) == 0

    @property
    def runs_at_once(self) -> int:
        """Runs of keys that a lane loads at once: 16 bytes of codes, or as many as it has."""
        bits = self.kv.keys.bits
        return min(16 // bits, self.chunks) if bits < 16 and self.mma.kind == "CUDA" else 1

    @property
    def key_words(self) -> int:
        """Words of such a load."""
        return self.runs_at_once * RUN * self.kv.keys.bits // 32

    @property
    def value_words(self) -> int:
        """Words of a lane's codes of one value."""
        return self.head_dim // RUN * self.kv.values.bits // 32

    def run_dim(self, slot: UOp, chunk: int) -> UOp:
        """The first dimension of the run in a slot of a chunk of keys and queries."""
        at_once = self.runs_at_once
        if self.kv.keys.bits != 4:
            start = chunk // at_once * at_once * self.chunk_dims
            return slot * (RUN * at_once) + (start + chunk % at_once * RUN)
        if at_once == 4:  # a lane has whole groups
            return slot * GROUP + (chunk // 4 * 4 * self.chunk_dims + chunk % 4 * RUN)
        if at_once == 2:  # and here both halves of bytes
            return slot // 2 * GROUP + slot % 2 * RUN + chunk * (GROUP // 2)
        return slot // 4 * GROUP + slot % 4 // 2 * RUN + slot % 2 * (GROUP // 2) + chunk * self.chunk_dims

    @property
    def key_groups(self) -> list[tuple[list[tuple[int, int]], tuple[int, ...]]]:
        """For each group of dimensions with a scale that the lane has a part of: (chunk, run) of its runs in order, and
        the masks that connect the lanes that have the others."""
        if self.mma.kind != "CUDA":  # two runs of neighboring slots
            return [([(c, 0), (c, 1)], (1,)) for c in range(self.chunks)]
        at_once = self.runs_at_once
        masks = {1: (1, 2), 2: (1,), 4: ()}[at_once]
        return [([(i + j, 0) for j in range(at_once)], masks) for i in range(0, self.chunks, at_once)]

    def value_dim(self, column: UOp, index: int) -> UOp:
        """The index-th dimension of the column-th of eight spans of values and results."""
        size = self.head_dim // RUN
        if self.kv.values.bits != 4:
            return column * size + index
        # both halves of the same bytes
        half, per_group = size // 2, GROUP // size
        start = column // per_group * GROUP + column % per_group * half
        return start + (index // half * (GROUP // 2) + index % half)

    def bounded(self, dim: UOp, chunk: int) -> tuple[UOp, UOp | None]:
        """(a dimension of a chunk, or some other that exists, whether it exists; None: all of the chunk's do)."""
        if (chunk + 1) * self.chunk_dims <= self.head_dim:
            return dim, None
        return (dim < self.head_dim).where(dim, dim - self.chunk_dims), dim < self.head_dim

    def uncovered_shape(self) -> str:
        if rest := super().uncovered_shape():
            return rest
        return f"blocks of {self.layout.block_size} tokens" if self.layout.block_size % TILE_TOKENS else ""

    @property
    def num_splits(self) -> int:
        """Parts of a context: several where the rows alone would leave most of the device idle. Several rows are split
        on CUDA only, and only if contexts may be long."""
        splits, is_cuda = MAX_SPLITS, self.lanes.kind == "CUDA"
        groups = self.layout.num_tokens * self.head_groups
        if self.layout.num_tokens == 1:
            if is_cuda:
                # a multiprocessor has registers for one threadgroup: those that wait for a second turn, even to find
                # that they have no tokens, cost more than more splits gain
                most = 1 << max(0, (MULTIPROCESSORS // groups).bit_length() - 1)
                splits = min(2 * MAX_SPLITS if self.is_long else self._splits_of_short, most)
            return self.knob("num_splits", splits)
        while splits > 1 and splits * groups > GROUPS_WANTED:
            splits //= 2
        return self.knob("num_splits", splits if is_cuda and self.is_long else 1)

    @property
    def _splits_of_short(self) -> int:
        """The most parts of a context that is not long: none for less than SHORTEST_SPAN tokens, as far as they are a
        power of two."""
        tokens = self.layout.max_blocks * self.layout.block_size
        return min(MAX_SPLITS // 2, 1 << (-(-tokens // SHORTEST_SPAN) - 1).bit_length())

    @property
    def split(self) -> SplitHeads:
        heads = (self.num_heads, self.head_dim)
        return SplitHeads(self.layout, *heads, self.num_splits, self.window, has_own_token=not self.adds_own)

    @property
    def is_split(self) -> bool:
        return self.num_splits > 1

    @property
    def combines_splits(self) -> bool:
        """Whether the last of the threadgroups that share a context combines their results, inside the kernel. If the
        next operation did, each of its many threadgroups would read all of them, which takes a product of 4,096 rows
        from 9 to 50 us on an H200."""
        return self.is_split and self.lanes.kind == "CUDA"

    @property
    def num_warps(self) -> int:
        wanted = self._warps_wanted
        if self._reads_integers and wanted == 4:
            wanted = 6
        shared = SHARED_BYTES
        if self.is_wide:
            wanted = min(wanted, 8)
            shared = CUDA_SHARED_BYTES if self.lanes.kind == "CUDA" else SHARED_BYTES
        while wanted > 1 and wanted * self.tile_heads * (self.head_dim + 2) * 4 + 2 * self.query_size > shared:
            wanted //= 2
        return self.knob("num_warps", wanted)

    @property
    def _warps_wanted(self) -> int:
        groups = self.layout.num_tokens * self.head_groups
        if self.is_split:
            # the shortest split takes one pass; several rows share a multiprocessor
            return 4 if self.layout.num_tokens > 1 else SHORTEST_SPAN // TILE_TOKENS
        if self.lanes.kind != "CUDA":
            return 4 if groups > 256 else METAL_WARPS
        # as many as there are registers for, if all threadgroups run at once: those that wait for others to end lose
        # more than a threadgroup gains by more warps. But a long context among short ones should not take too long
        fitting = RESIDENT_WARPS // groups
        return max(4 if self.is_long else 1, min(8, 1 << max(0, fitting.bit_length() - 1)))

    def exp2(self, x: UOp) -> UOp:
        return quick_exp2(x, self.lanes.kind)

    def maximum(self, a: UOp, b: UOp) -> UOp:
        return quick_maximum(a, b, self.lanes.kind)

    # -- threadgroup memory --------------------------------------------------------------------------------------------

    @property
    def shared_bytes(self) -> int:
        """Of the warps' states, of the row's heads with scores of its own token, and of the query."""
        states = self.num_warps * self.tile_heads * (self.state_stride + 2) * 4
        heads = (self.tile_heads + 2) * self.staged_stride * 2 + self.tile_heads * 4
        return states + (heads if self.stages_heads else 0) + 2 * self.query_size + 4

    @property
    def staged_stride(self) -> int:
        """Numbers from one of the row's heads to the next: two neighbors lie in different banks."""
        return self.head_dim + 32

    @property
    def state_stride(self) -> int:
        """Numbers from one head of a warp's state to the next."""
        return self.head_dim + (RUN + 1) * STATE_GAP if self._has_gaps else self.head_dim

    def state_place(self, dim: UOp) -> UOp:
        """Where a dimension lies in a state. Lanes store whole spans at once, so all of these would begin in the same
        bank: 16 times as many cycles, of heads of 128."""
        return dim + dim // (self.head_dim // RUN) * STATE_GAP if self._has_gaps else dim

    @property
    def _has_gaps(self) -> bool:
        return self.lanes.kind == "CUDA" and self.head_dim % (RUN * RUN) == 0

    @property
    def is_wide(self) -> bool:
        """Whether a lane's registers hold either keys or values of a tile next to its sums."""
        return self.head_dim >= WIDE_HEAD

    @property
    def saves_registers(self) -> bool:
        """Whether a lane holds at most 128 registers, which are all that METAL's threads have, in the order of the
        source."""
        return self.lanes.kind == "METAL"

    @property
    def loads_values_late(self) -> bool:
        """Whether a tile's values are loaded when its keys have been used."""
        return self.is_wide or self.saves_registers

    @property
    def takes_parts(self) -> bool:
        """Whether a tile's keys and values are loaded in parts, and the query lies in threadgroup memory."""
        return self.saves_registers and self.is_wide

    @property
    def query_size(self) -> int:
        """Elements of the query in threadgroup memory: those of each lane."""
        return TILE_HEADS * self.head_dim if self.takes_parts else 0

    @property
    def value_size(self) -> int:
        """Dimensions of each of the eight spans of a value."""
        return self.head_dim // RUN

    @property
    def value_parts(self) -> list[range]:
        """Of a span, those that are loaded at once."""
        count = RUN if self.takes_parts else self.value_size
        return [range(start, start + count) for start in range(0, self.value_size, count)]

    @property
    def loads_early(self) -> bool:
        """Whether a warp loads its first tiles while the previous kernel still runs: if it has registers for them, and
        no kernel of the step has written any of their tokens."""
        has_registers = self.stages_heads or not self.is_wide
        return self.lanes.is_chained and self.adds_own and has_registers and self.early > 0

    @property
    def fetches_ahead(self) -> int:
        """1 if a warp loads the keys and values of a pass while it attends to those of the pass before."""
        is_worth_it = self.stages_heads and self.layout.num_tokens * self.head_groups <= GROUPS_AHEAD
        is_worth_it = is_worth_it or self._packs_both
        return self.knob("fetches_ahead", int(is_worth_it and self.is_long and not self.is_wide))

    @property
    def _packs_both(self) -> bool:
        return self.packs(self.kv.keys) and self.packs(self.kv.values)

    @property
    def _reads_integers(self) -> bool:
        """Whether keys and values of long contexts are 8-bit integers, whose codes take the most registers: more warps
        are worth more than more tiles of each (H200, 8 rows of 32,768 tokens: 158 us, and 170 with two tiles)."""
        is_long = self._packs_both and self.is_long and not self.is_wide and self.layout.num_tokens > 1
        return is_long and self.head_dim > 64 and self.kv.keys == self.kv.values and self.kv.keys.name == "q8_0"

    @property
    def early(self) -> int:
        """1 if registers are worth more for early loads than for more threadgroups on a multiprocessor."""
        is_packed = self.packs(self.kv.keys) or self.packs(self.kv.values)
        return self.knob("early", int(not (is_packed and self.is_long and self.layout.num_tokens > 1)))

    @property
    def resident(self) -> int:
        """Threadgroups that a multiprocessor's registers must have room for; 0: as many as there happens to be."""
        return self.knob("resident", 2 if self._reads_integers and self.num_warps == 6 else 0)

    @property
    def tiles_ahead(self) -> int:
        """Tiles that a warp loads at once."""
        if self._packs_both and self.is_long and not self.is_wide and self.layout.num_tokens > 1:
            return self.knob("tiles_ahead", 1 if self._reads_integers else 2)
        return self.knob(
            "tiles_ahead", 2 if self.head_dim <= 64 and (self.is_long or self.layout.num_tokens >= 32) else 1
        )

    @property
    def is_long(self) -> bool:
        """Whether contexts may be long. What speeds up long ones costs short ones some tenths of a microsecond."""
        longest = self.layout.max_blocks * self.layout.block_size
        return min(longest, self.window or longest) >= LONG_CONTEXT


@dataclass(frozen=True)
class Buffers:
    """What the kernel writes. `split_values`, `split_sums`: see SplitHeads; None if the context is not split. `out`:
    None if the splits are left to the next operation. `arrivals`: None unless the kernel combines the splits."""

    out: UOp | None
    split_values: UOp | None
    split_sums: UOp | None
    arrivals: UOp | None
    keys: StoredHeads
    values: StoredHeads


def take_buffers(spec: DecodeSpec, operands: list[UOp]) -> Buffers:
    """The buffers at the front of a kernel's operands, which are removed."""
    out = operands.pop(0) if spec.combines_splits or not spec.is_split else None
    split_values, split_sums = (operands.pop(0) if spec.is_split else None for _ in range(2))
    arrivals = operands.pop(0) if spec.combines_splits else None
    keys, values = StoredHeads.of(spec, spec.take_planes(operands), spec.lanes)
    return Buffers(out, split_values, split_sums, arrivals, keys, values)


@dataclass(frozen=True)
class Threadgroup:
    """A thread's place: token row, group of query heads and split of the context; lane and warp. An axis of length 1 is
    the constant 0."""

    spec: DecodeSpec
    body: Body
    row: UOp | int
    heads: UOp | int
    split: UOp | int
    lane: UOp
    warp: UOp | int

    @property
    def axes(self) -> tuple[UOp, ...]:
        return axes_of(self.row, self.heads, self.split, self.lane, self.warp)

    @property
    def kv_head(self) -> UOp | int:
        return self.heads // (self.spec.group // self.spec.tile_heads)

    @property
    def is_first_of_kv_head(self) -> UOp:
        """Whether the threadgroup's query heads are the first of those that share the KV head."""
        return (self.heads % (self.spec.group // self.spec.tile_heads) + UOp.const(0, dtypes.weakint)).eq(0)

    @property
    def thread(self) -> UOp:
        return self.warp * LANES + self.lane

    @property
    def is_first_warp(self) -> UOp:
        return self.warp.eq(0) if isinstance(self.warp, UOp) else UOp.const(True, dtypes.bool)

    @property
    def adds_own(self) -> UOp:
        """Whether this is the threadgroup, of all that share the row and the query heads, that adds the row's own
        token."""
        return self.split.eq(0) if isinstance(self.split, UOp) else UOp.const(True, dtypes.bool)

    @property
    def has_own_token(self) -> UOp:
        """Whether this is the one warp that does so."""
        return self.is_first_warp & self.adds_own

    @property
    def writes_own(self) -> UOp:
        """Whether this is the threadgroup, of all that share the row and KV head, that writes the row's own token."""
        return self.adds_own & self.is_first_of_kv_head if self.spec.tile_heads < self.spec.group else self.adds_own

    def elements(self) -> list[tuple[UOp, UOp | None]]:
        """(element of the G * D outputs of the G heads, whether it exists) for each that the thread writes, neighbors
        where it has several. None: always."""
        spec = self.spec
        size, threads = spec.tile_heads * spec.head_dim, spec.num_warps * LANES
        width = 1
        while width < 4 and width * threads < size:
            width *= 2
        assert spec.head_dim % width == 0
        elements: list[tuple[UOp, UOp | None]] = []
        for start in range(0, size // width, threads):
            run = start + self.thread
            is_inside = None if (start + threads) * width <= size else run < size // width
            run = run if is_inside is None else is_inside.where(run, 0)
            elements += [(run * width + i, is_inside) for i in range(width)]
        return elements


def make_threadgroup(spec: DecodeSpec) -> Threadgroup:
    body = Body()
    row, heads = grid(body, spec.layout.num_tokens), grid(body, spec.head_groups)
    split, lane, warp = grid(body, spec.split.num_splits), body.threads(LANES), warps(body, spec.num_warps)
    return Threadgroup(spec, body, row, heads, split, lane, warp)


class Row:
    """A token row and a group of its heads: its inputs, and the lane's share of its query, key and value."""

    def __init__(self, group: Threadgroup, operands: list[UOp]) -> None:
        """`operands`: inputs, tables, and the parts of qkv."""
        spec, layout, row = group.spec, group.spec.layout, group.row
        self.spec, self.group = spec, group
        self.inputs, *rest = operands
        self.tables = spec.take_tables(rest, with_sinks=True)
        self.qkv = rest  # not to be read before `wait`
        limit = max(layout.max_blocks * layout.block_size, 4096)  # more than two passes of a loop: Body.fold_while
        self.past = clamp(self.inputs[layout.offset("positions") + row].load(), 0, limit - 1)
        seq = clamp(self.inputs[layout.offset("seq_rows") + row].load(), 0, layout.num_seqs)
        self.table = seq * layout.max_blocks + spec.tables_start
        slot = clamp(self.inputs[spec.slots_start + row].load(), 0, spec.num_blocks * layout.block_size - 1)
        self.own_start = slot * spec.slot_elements + group.kv_head * spec.head_dim
        self.own_head = slot * spec.num_kv_heads + group.kv_head
        self.query_scale = spec.query_scale_at(self.tables.rope, self.past)
        self.head = spec.mma.head(group.lane)
        self.column = spec.mma.column(group.lane)

    def wait(self, ahead: Sequence[UOp], pool: Sequence[UOp] = ()) -> tuple[UOp, ...]:
        """Wait for the previous kernels. `ahead`, and cosines and sines if there are registers for them, are loaded
        meanwhile. Returns the buffers of `pool`, as they are after that."""
        factors = []
        if self.tables.rope is not None and not self.spec.is_wide and not self.spec.stages_heads:
            pairs = [
                self.spec.rope_factors(self.tables.rope, self.past, d) for runs in self.query_dims for d, _ in runs
            ]
            factors = [value for pair in pairs for values in pair for value in values]
        ahead = [*factors, *ahead]
        ready = await_previous(self.spec.lanes, *self.qkv, *pool, ahead=ahead, has_barrier=False)
        self.qkv = list(ready[: len(self.qkv)])
        return ready[len(self.qkv) :]

    @property
    def end(self) -> UOp:
        """The tokens that are read from the pool are those before this one."""
        return self.past if self.spec.adds_own else self.past + 1

    def loaded(self, section: int, head: UOp | int, dim: UOp, count: int = RUN) -> list[UOp]:
        """Dimensions [dim, dim + count) of a head of queries, keys or values, with their biases."""
        spec = self.spec
        part, start = spec.section(section)
        cols = spec.qkv_cols[part]
        offset = start + head * spec.head_dim + dim
        all_partials = spec.qkv_partials[part]
        values: list[UOp] = []
        at_once = PARTIALS_AT_ONCE if spec.saves_registers else all_partials
        for first in range(0, all_partials, at_once):
            earlier = self.held([values]) if first else []  # the sums of those before
            partials = [
                load_floats(self.qkv[part], (self.group.row + s * spec.layout.num_tokens) * cols + offset, count)
                for s in range(first, min(first + at_once, all_partials))
            ]
            values = [balanced(column) for column in zip(*earlier, *partials, strict=True)]
        if all_partials > at_once:
            (values,) = self.held([values])
        if self.tables.bias is None:
            return values
        biases = load_floats(self.tables.bias, spec.bias_start(section) + head * spec.head_dim + dim, count)
        return [a + b for a, b in zip(values, biases, strict=True)]

    def rotated(self, section: int, head: UOp | int) -> Runs:
        """The lane's runs (`query_dims`) of a head of queries or keys, normed if the model norms heads, and rotated by
        the row's position. Zeros for dimensions that do not exist."""
        scale = self._head_scale(section, head)
        return [[self._run(section, head, place, scale) for place in runs] for runs in self.query_dims]

    def rounded(self, section: int, head: UOp | int, dtype: DType) -> Runs:
        """`rotated` in a dtype, in turns."""
        scale, dims = self._head_scale(section, head), self.query_dims
        found: dict[tuple[int, int], list[UOp]] = {}
        for turn in self.turns:
            runs = [[v.cast(dtype) for v in self._run(section, head, dims[c][n], scale)] for c, n in turn]
            found |= dict(zip(turn, self.held(runs), strict=True))
        return [[found[c, n] for n in range(len(runs))] for c, runs in enumerate(dims)]

    @property
    def turns(self) -> list[list[tuple[int, int]]]:
        """(chunk, run) of those that are computed at once: all, or where that takes too many registers, those that are
        each other's partners under RoPE."""
        chunks = self.spec.chunks
        runs = [(c, n) for c in range(chunks) for n in range(len(self.query_dims[0]))]
        if not self.has_turns:
            return [runs]
        count = chunks // 2 if self.spec.head_dim % (2 * self.spec.chunk_dims) == 0 else chunks
        return [[(c, n) for c, n in runs if (c % count, n) == first] for first in runs if first[0] < count]

    @property
    def has_turns(self) -> bool:
        """Whether a lane's part of a head, with the partial sums and partners that it is computed from, takes more than
        about a third of its registers."""
        spec = self.spec
        has_more = spec.head_eps is not None or spec.has_bias or spec.head_dim % spec.chunk_dims != 0
        return spec.saves_registers and (has_more or spec.head_dim // 4 * max(spec.qkv_partials) > 128 // 3)

    def held(self, runs: list[list[UOp]]) -> list[list[UOp]]:
        """The same runs, before which nothing more of qkv is loaded, if that saves registers."""
        if not self.spec.saves_registers:
            return runs
        values, done = hold(self.group.body, [v for run in runs for v in run])
        self.load_after(done)
        rest = iter(values)
        return [[next(rest) for _ in run] for run in runs]

    def load_after(self, done: UOp) -> None:
        """Load what is still to be loaded of qkv, and in turns of cosines and sines, after `done`."""
        self.qkv = [part.after(done) for part in self.qkv]
        if self.has_turns and self.tables.rope is not None:
            self.tables = replace(self.tables, rope=self.tables.rope.after(done))

    def _run(self, section: int, head: UOp | int, place: tuple[UOp, UOp | None], scale: UOp | None) -> list[UOp]:
        """A run of `query_dims`, as `rotated` has it."""
        dim, is_inside = place
        return _zeros_outside(self._rotated_run(section, head, dim, scale), is_inside)

    def _rotated_run(self, section: int, head: UOp | int, dim: UOp, scale: UOp | None) -> list[UOp]:
        if self.tables.rope is None:
            return self._normed(section, head, dim, scale)
        return self.spec.rotated_run(self.tables.rope, self.past, dim, lambda d: self._normed(section, head, d, scale))

    def _normed(self, section: int, head: UOp | int, dim: UOp, scale: UOp | None) -> list[UOp]:
        values = self.loaded(section, head, dim)
        if self.tables.head_norm is None or scale is None:
            return values
        weights = load_floats(self.tables.head_norm, section * self.spec.head_dim + dim, RUN)
        return [v * scale * w for v, w in zip(values, weights, strict=True)]

    def _head_scale(self, section: int, head: UOp | int) -> UOp | None:
        """1 / sqrt(mean square + eps) of the lane's head, in each lane that holds some of it; None without a norm."""
        if self.spec.head_eps is None:
            return None
        squares = []
        for turn in self.turns:
            places = [self.query_dims[c][n] for c, n in turn]
            runs = [_zeros_outside(self.loaded(section, head, d), ok) for d, ok in places]
            partial = [[balanced(dot(run, run) for run in runs)]]
            squares += self.held(partial)[0] if self.has_turns else partial[0]
        return self._rms_factor(squares, self.spec.head_eps)

    def _rms_factor(self, squares: list[UOp], eps: float) -> UOp:
        """`squares`: sums of them in this lane."""
        total = self.spec.lanes.sum(balanced(squares), self.spec.mma.row_masks)
        return (total * (1.0 / self.spec.head_dim) + eps).sqrt().reciprocal()

    def value(self) -> list[list[UOp]]:
        """The lane's two spans (`DecodeSpec.value_dim`) of the KV head's value, normed if the model norms values."""
        spans = [self._span(e, range(self.spec.value_size)) for e in range(2)]
        if self.spec.value_eps is None:
            return spans
        factor = self._rms_factor([balanced(dot(span, span) for span in spans)], self.spec.value_eps)
        return [[value * factor for value in span] for span in spans]

    def rounded_value(self, dtype: DType) -> list[list[UOp]]:
        """`value` in a dtype, in turns."""
        if not self.has_turns or self.spec.value_eps is not None:
            return [[v.cast(dtype) for v in span] for span in self.value()]
        spans = []
        for e in range(2):
            parts = [self.held([[v.cast(dtype) for v in self._span(e, part)]])[0] for part in self.spec.value_parts]
            spans.append([v for part in parts for v in part])
        return spans

    def _span(self, e: int, part: range) -> list[UOp]:
        """Part of one of the two spans, not normed."""
        most = self.spec.value_size // 2 if self.spec.kv.values.bits == 4 else self.spec.value_size  # neighbors
        most = min(most, len(part))
        runs = [(start + i, min(RUN, most - i)) for start in part[::most] for i in range(0, most, RUN)]
        loads = [(self.spec.value_dim(self.column + e, start), count) for start, count in runs]
        return [v for dim, count in loads for v in self.loaded(VALUES, self.group.kv_head, dim, count)]

    @property
    def query_dims(self) -> list[list[tuple[UOp, UOp | None]]]:
        """(first dimension, whether it exists) of the lane's runs of its query head, by chunk and then as in
        `Mma.token_runs`. See `DecodeSpec.bounded`."""
        spec = self.spec
        return [
            [spec.bounded(spec.run_dim(slot, c), c) for _, slot in spec.mma.token_runs(self.group.lane)]
            for c in range(spec.chunks)
        ]


def _zeros_outside(run: list[UOp], is_inside: UOp | None) -> list[UOp]:
    return run if is_inside is None else [is_inside.where(value, 0.0) for value in run]
