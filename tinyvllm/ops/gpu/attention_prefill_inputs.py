"""The inside of the prefill kernels: their spec, and a step's inputs and qkv as the kernels read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tinygrad import UOp

from tinyvllm.ops.attention_spec import VALUES
from tinyvllm.ops.gpu.attention_fused import FusedAttentionSpec
from tinyvllm.ops.kernel.body import F16, balanced, clamp
from tinyvllm.ops.kernel.hopper import GROUP_WARPS, HOPPER_SHARED_BYTES, MAP_WORDS, MULTIPROCESSORS, WGMMA_COLS, Box
from tinyvllm.ops.kernel.lanes import LANES, dot, load_cuda_floats, load_floats
from tinyvllm.ops.kernel.tiles import PIECE, TILE_COLS, TileMma
from tinyvllm.ops.kernel.tuning import Tunable

ROW_BYTES = WGMMA_COLS * 2  # of a row of Hopper's tiles
HOPPER_KEYS = {64: 96, 128: 128, 256: 64}  # of a tile, by dimensions of a head: what registers hold beside the sums
STAGES = 2  # tiles of keys, and of values, in Hopper's threadgroup memory
BARRIER_BYTES = 1024
REGISTERS = 1 << 16  # of a multiprocessor
FETCHER_REGISTERS = 24  # that a thread of the fetching warp's group keeps
UNPACKER_REGISTERS = {64: 80, 128: 104, 256: 72}  # if it unpacks codes, by dimensions of a head
SPARE_REGISTERS = 40  # of a thread, besides scores, weights and sums
MAP_THREADS = 256
MIN_LOOP = 2  # iterations that a loop must be able to run: Body.fold_while

Halves = tuple[list[UOp], list[UOp]]  # eight dimensions of a head, and those half a head further


@dataclass(frozen=True, kw_only=True)
class PrefillSpec(FusedAttentionSpec, Tunable):
    """Attention of any rows, over paged KV in float16."""

    has_wgmma: bool = False  # the device has wgmma, Hopper's matrix instruction of four warps

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        if not self.uses_wgmma:
            return {}
        return {"keys": (64, 96, 128, 160), "groups": (2, 3), "fetchers": (1, 2, 3, 4, 8)}

    def is_possible(self) -> bool:
        used = self.keys // 2 + self.keys // 4 + self.head_dim // 2 + SPARE_REGISTERS
        return (
            self.keys % self.layout.block_size == 0
            and self.copies % self.fetchers == 0
            and self.shared_bytes <= HOPPER_SHARED_BYTES
            and used <= self.registers
        )

    @property
    def head_dims(self) -> tuple[int, ...]:
        return (64, 96, 128, 256)

    def uncovered_shape(self) -> str:
        if rest := super().uncovered_shape():
            return rest
        has_norm = self.head_eps is not None or self.value_eps is not None
        if has_norm and self.head_lanes & (self.head_lanes - 1):
            return f"normed heads of {self.head_dim} in a step with prompts"
        return ""

    @property
    def head_lanes(self) -> int:
        """Neighboring lanes that hold a head where it is loaded."""
        return self.head_dim // (2 * PIECE)

    @property
    def takes_turns(self) -> bool:
        """Whether keys and values take turns in the same threadgroup memory, because both would not fit."""
        return self.head_dim > 128

    @property
    def tiles(self) -> TileMma:
        return TileMma(self.mma)

    # -- Hopper's kernel -----------------------------------------------------------------------------------------------

    @property
    def uses_wgmma(self) -> bool:
        """Whether Hopper's kernel is used: if a head is whole tiles of 64 columns, and keys and values are both in
        float16 or both quantized."""
        is_alike = self.kv.keys.is_quantized == self.kv.values.is_quantized
        return self.has_wgmma and self.mma.dtype == F16 and self.head_dim % WGMMA_COLS == 0 and is_alike

    @property
    def groups(self) -> int:
        """Groups of four warps, each with 64 rows of the tile: as many as there are registers for."""
        return self.knob("groups", 3 if self.head_dim <= 64 else 2)

    @property
    def fetchers(self) -> int:
        """Lanes of the fetching warp that fetch: several look up their blocks at the same time."""
        return self.knob("fetchers", next(count for count in (4, 3, 2, 1) if self.copies % count == 0))

    @property
    def copies(self) -> int:
        """Copies that fetch a tile of keys, or of values."""
        return self.keys // self.layout.block_size * (self.head_dim // WGMMA_COLS)

    @property
    def num_units(self) -> int:
        """Threadgroups, which take turns with the pieces of work: tiles of tokens and KV heads."""
        return min(MULTIPROCESSORS, self.max_tiles * self.num_kv_heads)

    @property
    def launch_registers(self) -> int:
        """Registers of a thread when the kernel begins: an equal part of a multiprocessor's."""
        return REGISTERS // ((self.groups + 1) * GROUP_WARPS * LANES) // 8 * 8

    @property
    def registers(self) -> int:
        """Registers of a thread that multiplies, with those that the fetching warp's group gives. More than there are
        would never be given."""
        return (self.launch_registers * (self.groups + 1) - self.fetcher_registers) // self.groups // 8 * 8

    @property
    def fetcher_registers(self) -> int:
        """Registers of a thread of the fetching warp's group."""
        return UNPACKER_REGISTERS[self.head_dim] if self.kv.is_quantized else FETCHER_REGISTERS

    @property
    def tile_bytes(self) -> int:
        """Of a tile of keys, or of values."""
        return self.keys * self.head_dim * 2

    @property
    def query_bytes(self) -> int:
        return self.rows * self.head_dim * 2

    @property
    def shared_bytes(self) -> int:
        """Threadgroup memory of Hopper's kernel: queries, the stages of keys and of values, barriers, and codes."""
        return self.query_bytes + 2 * STAGES * self.tile_bytes + BARRIER_BYTES + self.staging_bytes

    @property
    def staging_bytes(self) -> int:
        """Of the codes of a tile of keys and one of values that threads copy, whole turns of the threads."""
        turn = GROUP_WARPS * LANES * 16
        forms = [form for form in (self.kv.keys, self.kv.values) if form.is_quantized]
        return sum(-(-form.code_bytes(self.keys * self.head_dim) // turn) * turn for form in forms)

    @property
    def query_box(self) -> Box:
        """The part of the queries (T, H, D) that a copy fetches: 64 columns of the heads of a tile's tokens."""
        row = self.head_dim * 2
        sizes = (self.head_dim, self.num_heads, self.layout.num_tokens)
        return Box(sizes, (row, self.num_heads * row), (WGMMA_COLS, self.group, self.tokens))

    @property
    def pool_box(self) -> Box:
        """The part of the keys or values (slots, K * D) that a copy fetches: 64 columns of a block of tokens."""
        size = self.layout.block_size
        row = self.slot_elements
        return Box((row, self.num_blocks * size), (row * 2,), (WGMMA_COLS, size))

    @property
    def map_words(self) -> int:
        """Words of the tensor maps of queries, keys and values."""
        return 3 * MAP_WORDS

    # -- tiles ---------------------------------------------------------------------------------------------------------

    @property
    def num_warps(self) -> int:
        """Warps that multiply."""
        return self.groups * GROUP_WARPS if self.uses_wgmma else 4

    @property
    def row_blocks(self) -> int:
        """Blocks of rows of a warp: as many as its registers hold sums of."""
        return 2 if self.head_dim <= 64 and not self.uses_wgmma else 1

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.num_warps * self.row_blocks * self.tiles.left_rows

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.rows // self.group

    @property
    def keys(self) -> int:
        """Keys of a tile. Threadgroup memory holds queries, and two tiles of keys and values on CUDA, one on METAL."""
        if self.takes_turns and not self.tiles.is_cuda:
            return 16
        if self.uses_wgmma:
            return self.knob("keys", HOPPER_KEYS[self.head_dim] // self.layout.block_size * self.layout.block_size)
        return 64 if self.tiles.is_cuda and self.head_dim <= 64 else 32

    @property
    def chunks(self) -> int:
        """Tiles of 32 columns in a head."""
        return self.head_dim // TILE_COLS

    @property
    def max_tiles(self) -> int:
        """The most tiles of tokens that a step can have: each sequence has at most two that are not full."""
        layout = self.layout
        return min(layout.num_tokens, layout.num_tokens // self.tokens + 2 * layout.num_seqs)

    @property
    def map_threads(self) -> int:
        return min(MAP_THREADS, -(-self.layout.num_tokens // LANES) * LANES)

    @property
    def map_size(self) -> int:
        """Words of the tile map: more than there can be tiles, and a multiple of its threads."""
        return -(-(self.max_tiles + 1) // self.map_threads) * self.map_threads

    @property
    def for_map(self) -> PrefillSpec:
        """The same without what does not affect the tile map, which all layers share: the window, the softcap, and the
        group of the pool."""
        chosen = tuple(choice for choice in self.chosen if choice[0] == "groups")
        return replace(self, window=None, softcap=None, table_group=0, num_blocks=1, has_sinks=False, chosen=chosen)

    def parts(self, *sections: int) -> list[int]:
        """The parts of qkv that hold these sections. A kernel must read every buffer that it is given."""
        return sorted({self.section(index)[0] for index in sections})


class Inputs:
    """A step's inputs, and the qkv of its rows, inside a kernel."""

    def __init__(
        self, spec: PrefillSpec, inputs: UOp, operands: Sequence[UOp] = (), *sections: int, with_sinks: bool = False
    ) -> None:
        """`operands`: the tables, and the parts of qkv that hold `sections`, of a kernel that reads these."""
        self.spec, self.inputs = spec, inputs
        layout, rest = spec.layout, list(operands)
        self.tables = spec.take_tables(rest, with_sinks=with_sinks) if sections else None
        self.qkv = dict(zip(spec.parts(*sections), rest, strict=True))
        self.positions = max(layout.max_blocks * layout.block_size, MIN_LOOP * spec.keys)

    def position(self, row: UOp) -> UOp:
        return clamp(self.inputs[self.spec.layout.offset("positions") + row].load(), 0, self.positions - 1)

    def sequence(self, row: UOp) -> UOp:
        return clamp(self.inputs[self.spec.layout.offset("seq_rows") + row].load(), 0, self.spec.layout.num_seqs)

    def slot(self, row: UOp) -> UOp:
        """The slot of a row's own key and value."""
        last = self.spec.num_blocks * self.spec.layout.block_size - 1
        return clamp(self.inputs[self.spec.slots_start + row].load(), 0, last)

    def slot_of(self, sequence: UOp, key: UOp) -> UOp:
        """The slot of a sequence's key."""
        layout = self.spec.layout
        at = self.spec.tables_start + sequence * layout.max_blocks + key // layout.block_size
        return clamp(self.inputs[at].load(), 0, self.spec.num_blocks - 1) * layout.block_size + key % layout.block_size

    def loaded(self, section: int, row: UOp, head: UOp | int, dim: UOp) -> list[UOp]:
        """Dimensions [dim, dim + 8) of a head of queries, keys or values, with their biases."""
        spec = self.spec
        index, start = spec.section(section)
        cols = spec.qkv_cols[index]
        at = row * cols + start + head * spec.head_dim + dim
        partials = [
            self._floats(self.qkv[index], at + s * (spec.layout.num_tokens * cols), cols)
            for s in range(spec.qkv_partials[index])
        ]
        values = [balanced(column) for column in zip(*partials, strict=True)]
        if self.tables is None or self.tables.bias is None:
            return values
        biases = self._floats(self.tables.bias, spec.bias_start(section) + head * spec.head_dim + dim)
        return [a + b for a, b in zip(values, biases, strict=True)]

    def _floats(self, buffer: UOp, at: UOp, cols: int = PIECE) -> list[UOp]:
        """Eight neighbors. `cols`: of the buffer's rows."""
        in_vectors = self.spec.lanes.kind == "CUDA" and cols % PIECE == 0
        return (load_cuda_floats if in_vectors else load_floats)(buffer, at, PIECE)

    def rotated(self, section: int, row: UOp, head: UOp | int, dim: UOp) -> Halves:
        """Dimensions [dim, dim + 8), dim < D / 2, and those D / 2 further, normed if the model norms heads, and rotated
        by the row's position. Neighboring lanes must hold the rest of the head."""
        assert self.tables is not None
        spec, half, rope = self.spec, self.spec.head_dim // 2, self.tables.rope
        low, high = self.loaded(section, row, head, dim), self.loaded(section, row, head, dim + half)
        scale = None if spec.head_eps is None else self._head_scale(low + high, spec.head_eps)
        if rope is not None and (spec.rotary < spec.head_dim or spec.is_interleaved):
            position = self.position(row)

            def load(at: UOp) -> list[UOp]:
                return self._normed(section, self.loaded(section, row, head, at), at, scale)

            return spec.rotated_run(rope, position, dim, load), spec.rotated_run(rope, position, dim + half, load)
        low, high = self._normed(section, low, dim, scale), self._normed(section, high, dim + half, scale)
        if rope is None:
            return low, high
        at = self.position(row) * spec.rope_cols + dim  # the two are partners
        cos, sin = (self._floats(rope, at + i, spec.rope_cols) for i in (0, half))
        pairs = list(zip(low, high, cos, sin, strict=True))
        return [a * c - b * s for a, b, c, s in pairs], [b * c + a * s for a, b, c, s in pairs]

    def value(self, row: UOp, head: UOp | int, dim: UOp) -> Halves:
        """The same dimensions of a head of values, normed if the model norms values."""
        low, high = (self.loaded(VALUES, row, head, at) for at in (dim, dim + self.spec.head_dim // 2))
        if self.spec.value_eps is None:
            return low, high
        scale = self._head_scale(low + high, self.spec.value_eps)
        return [v * scale for v in low], [v * scale for v in high]

    def _normed(self, section: int, values: list[UOp], dim: UOp, scale: UOp | None) -> list[UOp]:
        if scale is None or self.tables is None or self.tables.head_norm is None:
            return values
        weights = self._floats(self.tables.head_norm, section * self.spec.head_dim + dim)
        return [v * scale * w for v, w in zip(values, weights, strict=True)]

    def _head_scale(self, values: list[UOp], eps: float) -> UOp:
        """1 / sqrt(mean square + eps) of a head; each of D / 16 neighboring lanes holds 16 of its values."""
        spec = self.spec
        masks = [1 << i for i in range(spec.head_lanes.bit_length() - 1)]
        total = spec.lanes.sum(dot(values, values), masks)
        return (total * (1.0 / spec.head_dim) + eps).sqrt().reciprocal()
