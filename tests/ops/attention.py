"""Cases of attention: shapes, batches, and one step of a backend over a pool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.builders import encode_floats
from tests.ops.builders import Piece, make_pool, make_step_of, normal, read_pool
from tinyvllm.config import KVFormat, KVFormats, LayerKind, QueryScaling, Rope
from tinyvllm.model.rope import rope_table
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import PLAIN, Backend
from tinyvllm.ops.gpu.fused import FusedGpuBackend
from tinyvllm.ops.kv_reference import dequantize, quantize
from tinyvllm.ops.step_inputs import StepLayout

from tinygrad import Tensor  # isort: skip  (tinyvllm makes its settings first)


@dataclass(frozen=True)
class Case:
    """A shape of attention. H and K heads of D; `widths` are the columns of qkv's parts in units of heads. `padding`
    columns follow, which nobody may read. Heads are `normed` before they are rotated, or not."""

    heads: int
    kv_heads: int
    dim: int
    layout: StepLayout
    is_decode: bool
    dtype: str = "float32"
    widths: tuple[int, ...] = ()
    normed: bool = False
    features: tuple[tuple[str, Any], ...] = ()  # fields of LayerKind beyond these
    padding: int = 0
    verifies: bool = False  # rows of few sequences, by the kernels of decodes
    partials: int = 1  # sums that qkv's parts come in

    @property
    def kind(self) -> LayerKind:
        eps = 0.05 if self.normed else None  # an epsilon that shows
        plain = LayerKind(self.heads, self.kv_heads, self.dim, Rope(10000.0), head_norm_eps=eps)
        return replace(plain, **dict(self.features))

    @property
    def parts(self) -> tuple[int, ...]:
        """Columns of qkv's parts."""
        *most, last = (width * self.dim for width in self.widths or (self.heads + 2 * self.kv_heads,))
        return (*most, last + self.padding)

    @property
    def name(self) -> str:
        step = f"{'decode' if self.is_decode else 'verify' if self.verifies else 'mixed'}{self.layout.num_tokens}"
        names = ["normed"] if self.normed else []
        names += [f"{name}={'rope' if name == 'rope' else value}" for name, value in self.features]
        kind = "-".join([self.dtype, *names])
        return f"{step}-{self.heads}over{self.kv_heads}x{self.dim}-{self.layout.block_size}-{kind}"


DECODE = [
    Case(9, 3, 64, StepLayout(1, 1, 8, 16), True, "float16"),  # the default model's
    Case(4, 4, 16, StepLayout(3, 3, 5, 8), True),  # no grouping
    Case(8, 2, 32, StepLayout(4, 4, 3, 32), True, "float16", (8, 2, 2)),
    Case(8, 1, 128, StepLayout(2, 2, 4, 16), True),
    Case(6, 2, 16, StepLayout(5, 5, 3, 8), True, "float16", (8, 2)),
    Case(16, 8, 128, StepLayout(1, 1, 8, 16), True, "float16", normed=True),  # Qwen3's
    Case(4, 2, 40, StepLayout(3, 3, 4, 16), True, "float32", (4, 2, 2), normed=True),
]
MIXED = [
    Case(9, 3, 64, StepLayout(16, 3, 6, 16), False, "float16", (12, 3)),  # V in another format than Q and K
    Case(2, 2, 16, StepLayout(24, 2, 3, 32), False),
    Case(8, 1, 32, StepLayout(16, 4, 9, 8), False, "float16"),
    Case(4, 1, 128, StepLayout(8, 2, 2, 16), False, "float32", (4, 1, 1)),
    Case(4, 2, 64, StepLayout(8, 2, 2, 64), False),
    Case(16, 8, 128, StepLayout(16, 3, 3, 16), False, "float16", normed=True),
    Case(3, 1, 24, StepLayout(12, 2, 4, 8), False, "float32", (3, 1, 1), normed=True),
]
# what layers of other families ask for, beyond Llama's
FEATURES: dict[str, tuple[tuple[str, Any], ...]] = {
    "gemma": (("window", 11), ("score_scale", 0.3), ("softcap", 1.5)),
    "gpt-oss": (("window", 5), ("has_sinks", True), ("has_bias", True)),
    "no rope": (("rope", None), ("value_norm_eps", 0.1)),
    "partial rope": (("rope", Rope(10000.0, num_dims=8)),),
    "scaled queries": (("query_scaling", QueryScaling(0.7, 5)), ("rope", Rope(10000.0, num_dims=12))),
    "whole norms": (("head_norm_is_whole", True), ("head_norm_eps", 0.05), ("has_bias", True)),
    "all": (
        ("window", 9),
        ("softcap", 2.0),
        ("has_bias", True),
        ("has_sinks", True),
        ("value_norm_eps", 0.1),
        ("score_scale", 0.7),
        ("rope", Rope(100.0, num_dims=8, is_interleaved=True)),
    ),
}


# what the fused kernels of CUDA and METAL cover: by name, heads, kv heads, D, whether heads are normed, and features
FUSED: dict[str, tuple[int, int, int, bool, tuple[tuple[str, Any], ...]]] = {
    "gemma 3": (4, 1, 256, True, (("window", 37), ("score_scale", 0.06))),
    "gemma 2": (4, 2, 256, False, (("softcap", 5.0), ("score_scale", 0.06))),
    "phi 3": (6, 6, 96, False, (("window", 90),)),
    "phi 4 mini": (6, 2, 128, False, (("rope", Rope(10000.0, num_dims=96)),)),
    "glm 4": (16, 1, 128, False, (("rope", Rope(10000.0, num_dims=64, is_interleaved=True)), ("has_bias", True))),
    "gpt-oss": (16, 2, 64, False, (("window", 70), ("has_sinks", True), ("has_bias", True))),
    "ministral 3": (8, 2, 128, False, (("query_scaling", QueryScaling(0.5, 16)),)),
    "gemma 4": (4, 2, 64, True, (("value_norm_eps", 0.1), ("score_scale", 1.0))),
    "all": (
        12,
        1,
        64,
        True,
        (
            ("window", 49),
            ("softcap", 2.0),
            ("has_bias", True),
            ("has_sinks", True),
            ("value_norm_eps", 0.1),
            ("rope", Rope(100.0, num_dims=32, is_interleaved=True)),
        ),
    ),
}


def fused_case(name: str, layout: StepLayout, *, is_decode: bool) -> Case:
    heads, kv_heads, dim, normed, features = FUSED[name]
    return Case(heads, kv_heads, dim, layout, is_decode, "float16", normed=normed, features=features)


@dataclass(frozen=True)
class Result:
    """What attention returned, and the pool before and after it in plain order."""

    out: np.ndarray  # (T, H, D)
    before: tuple[np.ndarray, np.ndarray]
    after: tuple[np.ndarray, np.ndarray]


def attend(ops: Backend, case: Case, buffer: np.ndarray, history: tuple[np.ndarray, np.ndarray]) -> Result:
    """Run one step over a pool that holds `history`: keys and values (slots, K, D)."""
    size = case.layout.block_size
    pool = make_pool(ops, case.kind, size, case.dtype, *history)
    before = read_pool(ops, case.kind, size, pool)
    qkv = normal(case.layout.num_tokens, sum(case.parts), seed=3)
    parts = [_uploaded(ops, case, part) for part in np.split(qkv, np.cumsum(case.parts)[:-1], axis=1)]
    step = make_step_of(ops, case.layout, buffer, pool, is_decode=case.is_decode, verifies=case.verifies)
    out = ops.attend(parts, make_layer(ops, case), step)
    parts_out = [part.numpy().reshape(case.layout.num_tokens, -1) for part in ops.parts_of(out)]
    rows = np.concatenate(parts_out, axis=1).reshape(-1, case.heads, case.dim)
    return Result(rows, before, read_pool(ops, case.kind, size, pool))


def _uploaded(ops: Backend, case: Case, part: np.ndarray) -> Tensor:
    """A part of qkv, in partial sums if the backend has such."""
    if case.partials == 1 or not isinstance(ops, FusedGpuBackend):
        return ops.device.upload(part)
    sums = normal(case.partials, *part.shape, seed=7)
    sums[-1] += part - sums.sum(axis=0)
    return ops._pending_sum(ops.device.upload(sums), case.partials, case.layout.num_tokens, PLAIN)


def make_layer(ops: Backend, case: Case) -> AttentionLayer:
    """The case's layer, with tables that show: other weights for queries than for keys."""
    kind, upload = case.kind, ops.device.upload
    positions = case.layout.max_blocks * case.layout.block_size
    rope = None if kind.rope is None else upload(rope_table(kind.rope, kind.head_dim, positions, kind.query_scaling))
    heads = case.heads + case.kv_heads if kind.head_norm_is_whole else 2
    return AttentionLayer(
        index=0,
        kind=kind,
        qkv_cols=case.parts,
        rope=rope,
        head_norm=None if kind.head_norm_eps is None else upload(1 + 0.3 * normal(heads * case.dim, seed=4)),
        bias=upload(normal(sum(case.parts) - case.padding, seed=5)) if kind.has_bias else None,
        sinks=upload(normal(case.heads, seed=6)) if kind.has_sinks else None,
    )


def make_history(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of every slot of the pool, of numbers that its dtype holds exactly, or its format almost."""
    slots = (case.layout.num_seqs * case.layout.max_blocks + 1) * case.layout.block_size

    def stored(seed: int, form: KVFormat) -> np.ndarray:
        plain = normal(slots, case.kv_heads, case.dim, seed=seed)
        if form.is_quantized:
            return dequantize(*quantize(plain, form), form)
        return encode_floats(plain, form.name).astype(np.float32)

    formats = KVFormats.of(*case.dtype.split("/"))
    return stored(1, formats.keys), stored(2, formats.values)


def forget_before_windows(
    case: Case, buffer: np.ndarray, pieces: list[Piece], history: tuple[np.ndarray, np.ndarray], bad: float = np.nan
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The same step after each sequence has given back the blocks before its window: they are 0 in its table. Block 0
    and all blocks that are in no table hold `bad`."""
    buffer, size = buffer.copy(), case.layout.block_size
    tables, held = case.layout.views(buffer)["block_tables"][0], []
    for index, piece in enumerate(pieces):
        first = 0 if case.kind.window is None else max(0, piece.start - (case.kind.window - 1)) // size
        tables[index, :first] = 0
        held += [tables[index, p // size] * size + p % size for p in range(first * size, piece.start + piece.count)]
    others = np.setdiff1d(np.arange(len(history[0])), held)
    spoiled = (history[0].copy(), history[1].copy())
    for plain in spoiled:
        plain[others] = bad
    return buffer, spoiled


def decode_pieces(case: Case) -> list[list[Piece]]:
    """Batches whose contexts are 1, end at and just past a block's end, and are the longest."""
    size, rows = case.layout.block_size, case.layout.num_seqs
    longest = case.layout.max_blocks * size
    starts = [0, size - 1, size, longest - 1, longest // 2, 1, 2 * size - 1]
    starts += starts[: -len(starts) % rows]
    return [[Piece(start) for start in starts[i : i + rows]] for i in range(0, len(starts), rows)]


def mixed_pieces(case: Case) -> list[list[Piece]]:
    """Ragged batches: a chunk that ends at a block's end with a decode; one sequence over all rows; half empty."""
    size, tokens = case.layout.block_size, case.layout.num_tokens
    longest = case.layout.max_blocks * size
    chunk = tokens // 2
    return [
        [Piece(longest - chunk, chunk), Piece(size)],
        [Piece(0, tokens)],
        [Piece(size - 1, 3), Piece(0, tokens - 4)],
    ]


def random_case(seed: int, *, is_decode: bool) -> Case:
    """Normed heads of a shape that the kernels with matrix units serve."""
    rng = np.random.default_rng(seed)
    kv_heads, group, dim = int(rng.integers(1, 5)), int(rng.integers(1, 9)), int(rng.choice([64, 128]))
    heads, seqs = kv_heads * group, int(rng.integers(1, 20))
    widths = ((heads, kv_heads, kv_heads), (heads + kv_heads, kv_heads), ())[int(rng.integers(3))]
    tokens = seqs if is_decode else seqs + int(rng.integers(10, 100))
    layout = StepLayout(tokens, seqs, int(rng.integers(3, 20)), int(rng.choice([16, 32])))
    return Case(heads, kv_heads, dim, layout, is_decode, "float16", widths, normed=True)
