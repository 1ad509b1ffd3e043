"""The inside of the prefill kernels: their spec, and a step's inputs and qkv as the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tinygrad import UOp

from tinyvllm.ops.attention_spec import QUERIES, VALUES
from tinyvllm.ops.gpu.attention_fused import FusedAttentionSpec
from tinyvllm.ops.kernel.body import F16, balanced, clamp
from tinyvllm.ops.kernel.hopper import WGMMA_COLS
from tinyvllm.ops.kernel.lanes import LANES, dot, load_floats
from tinyvllm.ops.kernel.tiles import PIECE, TILE_COLS, TileMma

ROW_BYTES = WGMMA_COLS * 2  # of a row of Hopper's tiles
MAP_THREADS = 256
MIN_LOOP = 2  # iterations that a loop must be able to run: Body.fold_while

Halves = tuple[list[UOp], list[UOp]]  # eight dimensions of a head, and those half a head further


@dataclass(frozen=True, kw_only=True)
class PrefillSpec(FusedAttentionSpec):
    """Attention of any rows, over paged KV in float16."""

    has_wgmma: bool = False  # the device has wgmma, Hopper's matrix instruction of four warps

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
    def uses_wgmma(self) -> bool:
        """Whether Hopper's kernel is used: if a head is as wide as a tile."""
        return self.has_wgmma and self.mma.dtype == F16 and self.head_dim == WGMMA_COLS

    @property
    def num_warps(self) -> int:
        return 8 if self.uses_wgmma else 4

    @property
    def shared_bytes(self) -> int:
        """Threadgroup memory of Hopper's kernel: queries, and two tiles of keys and of values."""
        return (self.rows + 4 * self.keys) * ROW_BYTES

    @property
    def tiles(self) -> TileMma:
        return TileMma(self.mma)

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
        return replace(self, window=None, softcap=None, table_group=0, num_blocks=1, has_sinks=False)

    def parts(self, *sections: int) -> list[int]:
        """The parts of qkv that hold these sections. A kernel must read every buffer that it is given."""
        return sorted({self.section(index)[0] for index in sections})


class Inputs:
    """A step's inputs, and the qkv of its rows, inside a kernel."""

    def __init__(self, spec: PrefillSpec, inputs: UOp, operands: Sequence[UOp] = (), *sections: int) -> None:
        """`operands`: the tables, and the parts of qkv that hold `sections`, of a kernel that reads these."""
        self.spec, self.inputs = spec, inputs
        layout, rest = spec.layout, list(operands)
        self.tables = spec.take_tables(rest, with_sinks=QUERIES in sections) if sections else None
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
            load_floats(self.qkv[index], at + s * (spec.layout.num_tokens * cols), PIECE)
            for s in range(spec.qkv_partials[index])
        ]
        values = [balanced(column) for column in zip(*partials, strict=True)]
        if self.tables is None or self.tables.bias is None:
            return values
        biases = load_floats(self.tables.bias, spec.bias_start(section) + head * spec.head_dim + dim, PIECE)
        return [a + b for a, b in zip(values, biases, strict=True)]

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
        cos, sin = load_floats(rope, at, PIECE), load_floats(rope, at + half, PIECE)
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
        weights = load_floats(self.tables.head_norm, section * self.spec.head_dim + dim, PIECE)
        return [v * scale * w for v, w in zip(values, weights, strict=True)]

    def _head_scale(self, values: list[UOp], eps: float) -> UOp:
        """1 / sqrt(mean square + eps) of a head; each of D / 16 neighboring lanes holds 16 of its values."""
        spec = self.spec
        masks = [1 << i for i in range(spec.head_lanes.bit_length() - 1)]
        total = spec.lanes.sum(dot(values, values), masks)
        return (total * (1.0 / spec.head_dim) + eps).sqrt().reciprocal()
