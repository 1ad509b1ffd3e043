"""Products with experts in fused kernels: which kernels, in which tiles, and what passes from one to the next.

One token row: a product for gate and up, whose threadgroups read the rows of the k chosen experts, and one for down,
which adds up the k products. Several rows: the pairs of a token and an expert are sorted by expert (experts_order.py),
and both products work on tiles of rows that have the same expert; the k results of each token are added up where the
sum is normed. The inner loops are those of other products: vector.py, quantized_vector.py, matrix.py and gemm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyvllm.device.handle import FLOATS
from tinyvllm.ops.activation import rounded
from tinyvllm.ops.backend import Norm
from tinyvllm.ops.experts_spec import ExpertLayer, Routing
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.formats.runs import uncovered
from tinyvllm.ops.gpu.chosen import ChosenExperts
from tinyvllm.ops.gpu.experts_order import (
    GatherSpec,
    OrderSpec,
    count_kernel,
    gather_kernel,
    most_tiles,
    order_kernel,
)
from tinyvllm.ops.gpu.experts_route import RouteSpec, route_kernel
from tinyvllm.ops.gpu.gemm import UNPACK_ELEMENTS, ExpertGemmSpec, gemm_kernel, unpack_kernel
from tinyvllm.ops.gpu.gemm_hopper import (
    MIN_STEPS,
    RUN_ROWS,
    TOKEN_TILE,
    ExpertWgmmaSpec,
    expert_row_tile,
    wgmma_kernel,
)
from tinyvllm.ops.gpu.matrix import TOKENS, ExpertMatrixSpec, fits_matrix_unit, matrix_kernel
from tinyvllm.ops.gpu.quantized_vector import (
    ExpertQuantizedVectorSpec,
    fits_quantized_vector,
    quantized_vector_kernel,
)
from tinyvllm.ops.gpu.token_tiles import ExpertTiles
from tinyvllm.ops.gpu.vector import ExpertVectorSpec, vector_kernel
from tinyvllm.ops.kernel.body import F16, F32, I32, U32, empty, run_kernel
from tinyvllm.ops.kernel.hopper import WGMMA_COLS
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.tuning import choose

MOST_ROWS = 16  # of an expert, on average, up to which its tiles are small
UNPACK_ROWS = 64  # of an expert, on average, from which on quantized weights are unpacked first
MOST_TILES = 4  # of TOKENS rows each, in a tile there


@dataclass(frozen=True)
class SortedRows:
    """The order of a step's pairs: tile map and sorted pairs."""

    spec: OrderSpec
    tiles: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class FusedRouting(Routing):
    """A routing that remembers the norm that its router was given. `normed`: what the norm made of `x`."""

    x: Tensor | None = None
    norm: Norm | None = None
    normed: Tensor | None = None

    def normed_rows(self, x: Tensor, norm: Norm | None) -> Tensor | None:
        """norm(x), if it was the router's input."""
        if norm is None or self.norm is None or x is not self.x:
            return None
        is_same = norm.weight is self.norm.weight and norm.eps == self.norm.eps
        return self.normed if is_same else None


def uncovered_layer(layer: ExpertLayer, num_tokens: int, mma: Mma | None, dtype: str) -> str:
    """Why the fused kernels do not cover a layer's experts, in words; "" if they do."""
    for matrix in (layer.gate_up, layer.down):
        if reason := uncovered(matrix.format):
            return f"weights in {matrix.format.name}, which have {reason}"
    if num_tokens == 1:
        return ""
    if mma is None:
        return f"several rows, and no matrix unit for {dtype}"
    sizes = [(layer.gate_up.expert_size, True), (layer.down.expert_size, False)]
    odd = [rows for rows, is_gated in sizes if not fits_matrix_unit(mma, rows, is_gated=is_gated)]
    return f"{odd[0]} rows of a matrix, which do not fill the matrix unit's tiles" if odd else ""


def run_route(
    lanes: Lanes, layer: ExpertLayer, logits: Tensor, num_tokens: int, num_partials: int, more: dict[str, Any]
) -> FusedRouting:
    """The routing by the router's logits, in `num_partials` partial sums. `more`: other fields of the result."""
    spec = RouteSpec(lanes, layer.kind, num_tokens, layer.router.num_rows, num_partials, layer.stacks_shared)
    device, size = str(logits.device), num_tokens * spec.num_chosen
    outs = [empty(size, I32, device), empty(size, F32, device)]
    if spec.has_shared_weight:
        outs.append(empty(num_tokens, F32, device))
    rest = (layer.router_bias, layer.choice_bias, layer.expert_scale)
    read = [logits, *[tensor for tensor in rest if tensor is not None]]
    ids, weights, *shared = run_kernel(route_kernel(spec), outs, read)
    return FusedRouting(ids=ids, weights=weights, shared=shared[0] if shared else None, **more)


# -- one row -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneRow:
    """The products of one row. `half`: the matrix unit for quantized weights, if those are to be used on it."""

    lanes: Lanes
    half: Mma | None
    layer: ExpertLayer
    routing: Routing

    def gate_up(self, x: Tensor, norm: Norm | None, dtype: DType, *, rescales_input: bool) -> Tensor:
        """(k, ffn): activation(gate) * up of the row's experts, times their weights."""
        matrix, layer = self.layer.gate_up, self.layer
        chosen = ChosenExperts(
            matrix.num_experts,
            layer.num_chosen,
            matrix.num_cols,
            adds_up=False,
            has_bias=layer.gate_up_bias is not None,
        )
        norm_eps = None if norm is None else norm.eps
        fields = dict(name="experts_gate_up", norm_eps=norm_eps, activation=layer.kind.activation)
        spec = self._spec(matrix, chosen, matrix.num_cols, fields, rescales_input=rescales_input)
        read = [x, *([] if norm is None else [norm.weight]), self.routing.ids, self.routing.weights]
        read += [] if layer.gate_up_bias is None else [layer.gate_up_bias]
        return self._run(spec, spec.slots * spec.out_rows, dtype, matrix, read)

    def down(self, states: Tensor, residual: Tensor | None, dtype: DType, *, rescales_input: bool) -> Tensor:
        """(hidden,): the sum of the experts' products, plus the residual."""
        matrix, layer = self.layer.down, self.layer
        count, has_bias = layer.num_chosen, layer.down_bias is not None
        chosen = ChosenExperts(matrix.num_experts, count, matrix.num_cols, adds_up=True, has_bias=has_bias)
        fields = dict(name="experts_down", has_residual=residual is not None)
        spec = self._spec(matrix, chosen, count * matrix.num_cols, fields, rescales_input=rescales_input)
        read = [states, *([] if residual is None else [residual]), self.routing.ids, self.routing.weights]
        read += [] if layer.down_bias is None else [layer.down_bias]
        return self._run(spec, spec.out_rows, dtype, matrix, read)

    def _spec(
        self, matrix: Matrix, chosen: ChosenExperts, num_cols: int, more: dict[str, Any], *, rescales_input: bool
    ) -> ExpertVectorSpec | ExpertQuantizedVectorSpec:
        """`num_cols`: of x."""
        shape = dict(lanes=self.lanes, format=matrix.format, num_rows=matrix.expert_size, num_cols=num_cols)
        fields: dict[str, Any] = {**shape, "chosen_experts": chosen, **more}
        if matrix.format.is_quantized and self.half is not None:
            packed = ExpertQuantizedVectorSpec(mma=self.half, rescales_input=rescales_input, **fields)
            if fits_quantized_vector(packed):
                return choose(packed)
        return choose(ExpertVectorSpec(**fields))

    @staticmethod
    def _run(
        spec: ExpertVectorSpec | ExpertQuantizedVectorSpec, size: int, dtype: DType, matrix: Matrix, read: list[Tensor]
    ) -> Tensor:
        fn = vector_kernel(spec) if isinstance(spec, ExpertVectorSpec) else quantized_vector_kernel(spec)
        return run_kernel(fn, [empty(size, dtype, str(read[0].device))], [*matrix.planes, *read])[0]


# -- several rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ManyRows:
    """The products of several rows."""

    lanes: Lanes
    mma: Mma
    layer: ExpertLayer
    num_tokens: int
    has_wgmma: bool
    rounds_to_bfloat: bool  # results of experts, where 16 bits are enough: they may exceed float16's range
    factor: float = 1.0  # of what the first product passes on

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.layer.num_chosen

    @property
    def rows_per_expert(self) -> float:
        """Rows of each expert, if all are chosen equally often."""
        return self.num_pairs / self.layer.gate_up.num_experts

    @property
    def is_few(self) -> bool:
        """Whether there are so few rows that the weights take most of the time."""
        return self.rows_per_expert <= MOST_ROWS

    @property
    def passes_words(self) -> bool:
        """Whether what few rows pass on is bfloat16 in a float16 buffer, as `MatrixSpec.has_words` takes it."""
        is_bfloat = self.layer.down.format.name == "bfloat16" and self.mma.dtype == dtypes.bfloat16
        return self.is_few and is_bfloat and self.mma.kind == "CUDA"

    @property
    def uses_wgmma(self) -> bool:
        """Whether Hopper's kernel is used, after a kernel that sorts x, and for quantized weights one that unpacks
        them."""
        return (
            self.has_wgmma
            and not self.is_few
            and self._suits_wgmma(self.layer.gate_up, 2)
            and self._suits_wgmma(self.layer.down, 1)
        )

    @property
    def has_bfloat_bits(self) -> bool:
        """Whether the results are bfloat16 in float16 buffers."""
        return self.uses_wgmma and self.rounds_to_bfloat

    def _suits_wgmma(self, matrix: Matrix, sections: int) -> bool:
        """`sections`: gate and up, or one."""
        is_small = matrix.num_rows * matrix.num_cols <= UNPACK_ELEMENTS
        unpacks = matrix.format.is_quantized and self.rows_per_expert >= UNPACK_ROWS and is_small
        is_read = self._is_as_stored(matrix) or unpacks
        is_long = matrix.num_cols % WGMMA_COLS == 0 and matrix.num_cols >= MIN_STEPS * WGMMA_COLS
        return is_read and is_long and matrix.expert_size // sections % RUN_ROWS == 0

    def _is_as_stored(self, matrix: Matrix) -> bool:
        """Whether the matrix unit takes the matrix as it is."""
        return FLOATS.get(matrix.format.name) == self.mma.dtype

    @property
    def tile_rows(self) -> int:
        """Rows of a tile: as many as most experts have, so that few weights are read twice."""
        if self.is_few:
            tiles = 1
            while tiles < MOST_TILES and tiles * TOKENS < 1.5 * self.rows_per_expert:
                tiles *= 2
            return tiles * TOKENS
        if self.uses_wgmma:
            return TOKEN_TILE
        largest = 128 if self.mma.kind == "CUDA" else 64
        return largest if self.rows_per_expert >= 2 * largest else largest // 2

    def tiles(self, matrix: Matrix, *, is_first: bool, has_bias: bool) -> ExpertTiles:
        count = most_tiles(self.num_pairs, matrix.num_experts, self.tile_rows)
        return ExpertTiles(
            num_experts=matrix.num_experts,
            num_pairs=self.num_pairs,
            num_chosen=self.layer.num_chosen,
            num_tiles=count,
            tile_rows=self.tile_rows,
            is_first=is_first,
            has_bias=has_bias,
            factor=self.factor,
        )

    def sort(self, routing: Routing) -> SortedRows:
        """The rows by expert."""
        spec = OrderSpec.of(self.lanes, self.tiles(self.layer.gate_up, is_first=True, has_bias=False))
        device = str(routing.ids.device)
        outs = [empty(spec.num_pairs, I32, device), empty(spec.map_size, I32, device)]
        read = [routing.ids]
        if spec.parts > 1:
            read += run_kernel(count_kernel(spec), [empty(spec.counts_size, I32, device)], read)
        pairs, tiles = run_kernel(order_kernel(spec), outs, read)
        return SortedRows(spec, tiles, pairs)

    def gate_up(self, x: Tensor, rows: SortedRows, dtype: DType) -> Tensor:
        """(P, ffn) in sorted order: activation(gate) * up."""
        return self._multiply("experts_gate_up", self.layer.gate_up, x, rows, dtype, self.layer.gate_up_bias)

    def down(self, states: Tensor, rows: SortedRows, dtype: DType) -> Tensor:
        """(T, k, hidden): each expert's result. In float32 where there are so few that it costs nothing."""
        dtype = F32 if self.is_few else F16 if self.uses_wgmma else dtype
        return self._multiply("experts_down", self.layer.down, states, rows, dtype, self.layer.down_bias)

    def _multiply(
        self, name: str, matrix: Matrix, x: Tensor, rows: SortedRows, dtype: DType, bias: Tensor | None
    ) -> Tensor:
        if self.uses_wgmma:
            return self._multiply_wgmma(name, matrix, x, rows, dtype, bias)
        is_first = matrix is self.layer.gate_up
        tiles = self.tiles(matrix, is_first=is_first, has_bias=bias is not None)
        shape = (matrix.expert_size, matrix.num_cols, self.layer.kind.activation if is_first else None)
        read = [*matrix.planes, x, rows.tiles, rows.pairs, *([] if bias is None else [bias])]
        if self.is_few and self.mma.kind == "CUDA":
            few = ExpertMatrixSpec(name, self.lanes, self.mma, matrix.format, self.tile_rows, *shape, tiles=tiles)
            few = replace(choose(few), has_words=self.passes_words and not is_first)
            if self.passes_words and few.activation is not None:
                few, dtype = replace(few, activation=rounded(few.activation)), F16
            fn, out_rows = matrix_kernel(few), few.out_rows
        else:
            many = ExpertGemmSpec(name, self.mma, matrix.format, x.dtype, self.num_pairs, *shape, expert_tiles=tiles)
            fn, out_rows = gemm_kernel(many), many.out_rows
        return run_kernel(fn, [empty(self.num_pairs * out_rows, dtype, str(x.device))], read)[0]

    def _multiply_wgmma(
        self, name: str, matrix: Matrix, x: Tensor, rows: SortedRows, dtype: DType, bias: Tensor | None
    ) -> Tensor:
        """The same on Hopper. The first product's results are 16 bits wide."""
        is_first, device, size = matrix is self.layer.gate_up, str(x.device), (matrix.expert_size, matrix.num_cols)
        if is_first:
            gather = GatherSpec(self.num_pairs, self.layer.num_chosen, matrix.num_cols, self.mma.dtype)
            sorted_x = empty(self.num_pairs * matrix.num_cols, F16, device)
            x, dtype = run_kernel(gather_kernel(gather), [sorted_x], [x, rows.pairs])[0], F16
        planes: Sequence[Tensor] = matrix.planes
        if not self._is_as_stored(matrix):
            unpacked = empty(matrix.num_rows * matrix.num_cols, F16, device)
            fn = unpack_kernel(matrix.format, matrix.num_rows, matrix.num_cols, self.mma.dtype)
            planes = run_kernel(fn, [unpacked], planes)
        tiles = self.tiles(matrix, is_first=is_first, has_bias=bias is not None)
        expected = self.num_pairs // TOKEN_TILE + matrix.num_experts // 2
        spec = ExpertWgmmaSpec(
            name,
            self.mma,
            self.num_pairs,
            *size,
            row_tile=expert_row_tile(*size, expected, is_first),
            splits=1,
            activation=self.layer.kind.activation if is_first else None,
            expert_tiles=tiles,
            has_bfloat_results=self.mma.dtype != F16 if is_first else self.has_bfloat_bits,
        )
        outs = [empty(self.num_pairs * spec.out_rows, dtype, device), empty(spec.map_size, U32, device)]
        read = [*planes, x, rows.tiles, rows.pairs, *([] if bias is None else [bias])]
        return run_kernel(wgmma_kernel(spec), outs, read)[0]


__all__ = ["FusedRouting", "ManyRows", "OneRow", "run_route", "uncovered_layer"]
