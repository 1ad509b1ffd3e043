"""What the tests of kernels are made of: seeded weights of every format, steps as input buffers, plain pools."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
from tests import sweeps
from tests.builders import K_KINDS, encode_floats, random_k_rows
from tests.ops.formats.drawn import BY_NAME, draw_matrix
from tinyvllm.arrays import HostMatrix
from tinyvllm.config import KVFormats, LayerKind
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.model.weights.quant import decompose
from tinyvllm.ops.backend import PLAIN, Backend, Epilogue, KVPool, Norm, Step, pool_groups
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.kv_reference import dequantize, quantize
from tinyvllm.ops.sampling.sample import OUT_LOGPROB, OUT_RANK, OUT_TOKEN, OUT_TOP, OUT_TOP_LOGPROB, OUT_WIDTH
from tinyvllm.ops.step_inputs import PROCESSING_FLOATS, StepLayout

if TYPE_CHECKING:
    from tinygrad import Tensor

DENSE = ("float32", "float16", "bfloat16")
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_KINDS)
FORMATS = (*DENSE, *QUANTIZED)
PENALTIES = ("repetition", "frequency", "presence")


def make_host(fmt: str, rows: int, cols: int, seed: int = 0) -> HostMatrix:
    """A matrix as a checkpoint's reader hands it over, values of about 1 / sqrt(cols)."""
    if fmt in BY_NAME:
        return draw_matrix(BY_NAME[fmt], rows, cols, seed)
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((rows, cols)) / math.sqrt(cols)).astype(np.float32)
    if fmt in DENSE:
        return encode_floats(values, fmt)
    if fmt in K_KINDS:
        raw = random_k_rows(rng, fmt, rows, cols)
    else:
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[fmt])
    return decompose(fmt, raw, (rows, cols))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """In units of b's largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


# -- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Tokens [start, start + count) of one sequence, computed in a step."""

    start: int
    count: int = 1


def make_step(layout: StepLayout, pieces: list[Piece], *, seed: int = 0) -> np.ndarray:
    """The input buffer of a step over `pieces`; sequence i owns M blocks of its own, in a shuffled order. Rows after
    the pieces' are padding. Block ids run from 1 to R * M."""
    buffer = np.zeros(layout.size, np.int32)
    views = layout.views(buffer)
    rng = np.random.default_rng(seed)
    blocks = 1 + rng.permutation(layout.num_seqs * layout.max_blocks)
    views["block_tables"][:, :-1] = blocks.reshape(layout.num_seqs, layout.max_blocks)
    views["seq_rows"][:] = layout.num_seqs
    for name in ("num_logprobs", "suppressed_ids", "forced", "state_rows"):
        views[name][:] = -1
    row = 0
    for index, piece in enumerate(pieces):
        positions = np.arange(piece.start, piece.start + piece.count)
        rows = slice(row, row + piece.count)
        table = views["block_tables"][0, index]
        views["positions"][rows] = positions
        views["seq_rows"][rows] = index
        slots = table[positions // layout.block_size] * layout.block_size + positions % layout.block_size
        views["slots"][:, rows] = slots
        row += piece.count
        views["logit_rows"][index] = row - 1
    assert row <= layout.num_tokens, f"{row} rows do not fit into {layout}"
    return buffer


# -- pools in plain order, (slots, kv heads, D) ----------------------------------------------------------------------


def make_pool(
    backend: Backend, kind: LayerKind, block_size: int, dtype: str, keys: np.ndarray, values: np.ndarray
) -> KVPool:
    """A pool of one layer that holds the given keys and values. `dtype`: a format's name, or two: "q8_0/q4_0"."""
    num_blocks = len(keys) // block_size
    pool = backend.make_pool(pool_groups([kind]), num_blocks, block_size, KVFormats.of(*dtype.split("/")))
    halves = (
        (pool.formats.keys, pool.keys, pool.key_scales, keys, True),
        (pool.formats.values, pool.values, pool.value_scales, values, False),
    )
    for form, codes, all_scales, plain, is_key in halves:
        stored, scales = quantize(plain, form) if form.is_quantized else (encode_floats(plain, form.name), None)
        backend.device.write(codes[0], _from_plain(backend, stored, block_size, is_key))
        if scales is not None:
            backend.device.write(all_scales[0], _from_plain(backend, scales, block_size, is_key=True))
    return pool


def _from_plain(backend: Backend, plain: np.ndarray, block_size: int, is_key: bool) -> np.ndarray:
    """Rows of slots (slots, kv heads, columns) in the backend's order."""
    if not isinstance(backend, CpuBackend):
        return plain
    blocks = plain.reshape(-1, block_size, *plain.shape[1:])
    return np.ascontiguousarray(blocks.transpose(_to_cpu(is_key)))


def read_pool(backend: Backend, kind: LayerKind, block_size: int, pool: KVPool) -> tuple[np.ndarray, np.ndarray]:
    """The keys and values of a pool's first layer, float32."""
    plain, heads = [], kind.num_kv_heads
    halves = (
        (pool.formats.keys, pool.keys[0], pool.key_scales.get(0), True),
        (pool.formats.values, pool.values[0], pool.value_scales.get(0), False),
    )
    for form, codes, scales, is_key in halves:
        assert not isinstance(codes, tuple) and not isinstance(scales, tuple)  # as several cores have them
        if not form.is_quantized:
            plain.append(_to_plain(backend, codes.float().numpy(), pool, block_size, heads, is_key))
            continue
        stored = _to_plain(backend, codes.numpy().view(np.uint8), pool, block_size, heads, is_key)
        if scales is not None:
            own = _to_plain(backend, scales.numpy(), pool, block_size, heads, is_key=True)
            plain.append(dequantize(np.ascontiguousarray(stored), own, form))
        else:
            plain.append(dequantize(np.ascontiguousarray(stored), None, form))
    return plain[0], plain[1]


def _to_plain(
    backend: Backend, stored: np.ndarray, pool: KVPool, block_size: int, kv_heads: int, is_key: bool
) -> np.ndarray:
    """The inverse of `_from_plain`."""
    if isinstance(backend, CpuBackend):
        axes, sizes = _to_cpu(is_key), (pool.num_blocks[0], block_size, kv_heads, -1)
        stored = stored.reshape([sizes[axis] for axis in axes]).transpose(np.argsort(axes))
    return stored.reshape(pool.num_blocks[0] * block_size, kv_heads, -1)


def _to_cpu(is_key: bool) -> tuple[int, ...]:
    """Axes of (block, token, kv head, D) in the order in which the CPU kind stores them."""
    return (0, 2, 3, 1) if is_key else (0, 2, 1, 3)


# -- operations ------------------------------------------------------------------------------------------------------


def run_product(
    backend: Backend, x: Tensor, matrix: Matrix, tokens: int, norm: Norm | None = None, epilogue: Epilogue = PLAIN
) -> Tensor:
    """One product."""
    return backend.linear("test", x, [matrix], tokens, norm, epilogue)[0]


def make_epilogue(backend: Backend, residual: Tensor | None, rows: int, names: str) -> Epilogue:
    """An epilogue with what `names` lists, by their first letters: bias, norm after the product, scale, cap
    (r: the residual, which is an argument)."""
    upload = backend.device.upload
    return Epilogue(
        bias=upload(normal(rows, seed=11)) if "b" in names else None,
        post_norm=Norm(upload(1 + 0.3 * normal(rows, seed=12)), 0.05) if "n" in names else None,
        scale=0.7 if "s" in names else 1.0,
        residual=residual,
        softcap=1.5 if "c" in names else None,
    )


def make_step_of(
    backend: Backend,
    layout: StepLayout,
    buffer: np.ndarray | Tensor,
    pool: KVPool | None = None,
    *,
    is_decode: bool = False,
    verifies: bool = False,
    previous_output: Tensor | None = None,
) -> Step:
    """A step on a device; without a pool, of operations that need none."""
    inputs = backend.device.upload(buffer) if isinstance(buffer, np.ndarray) else buffer
    return Step(
        layout,
        inputs,
        pool or KVPool({}, {}, {}, KVFormats.of("float16")),
        is_decode,
        previous_output,
        verifies=verifies,
    )


# -- sampling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """What a sampling step answered, by sequence."""

    tokens: np.ndarray  # (R,)
    logprobs: np.ndarray  # (R,) float32
    ranks: np.ndarray  # (R,)
    top_ids: np.ndarray  # (R, MAX_LOGPROBS)
    top_logprobs: np.ndarray  # (R, MAX_LOGPROBS) float32


def sample(backend: Backend, logits: np.ndarray, **columns: Any) -> Sampled:
    """Sample each row of logits (R, V). `columns` are a step's sampling inputs by name, one value or one per row;
    `suppressed_ids` a list of ids a row. Unless told: greedy, no filters, no logprobs, seed = row, first draw."""
    num_rows, vocab = logits.shape
    seqs = shared_rows(num_rows, vocab)
    layout = StepLayout(seqs, seqs, 1, 8)
    inputs, tensor = backend.device.upload(pack_sampling(layout, columns)), upload_logits(backend.device, logits, seqs)
    return read_sampled(backend.sample(tensor, vocab, tensor.numel() // seqs, inputs, layout), num_rows)


def shared_rows(num_rows: int, vocab: int) -> int:
    """Rows of a step that samples `num_rows`: by default others follow that ask for nothing, since each number of rows
    compiles kernels of its own. The sweep samples as many as a test has."""
    return num_rows if sweeps.is_sweeping else max(num_rows, 1024 if vocab <= 40 else 64)


FLOAT_COLUMNS = ("temperature", "top_p", "min_p")


def pack_sampling(layout: StepLayout, columns: dict[str, Any]) -> np.ndarray:
    """The input buffer of a step that samples a token for every sequence. Columns may be those of the first rows."""
    buffer = make_step(layout, [])
    views = layout.views(buffer)
    for name, off in {"top_p": 1.0, **PROCESSING_FLOATS}.items():
        views[name].view(np.float32)[:] = off
    views["seed"][:] = np.arange(layout.num_seqs)
    for name, column in columns.items():
        if name == "suppressed_ids":
            for row, ids in enumerate(column):
                views[name][row, : len(ids)] = ids
        else:
            view = views[name].view(np.float32) if name in (*FLOAT_COLUMNS, *PROCESSING_FLOATS) else views[name]
            view[: np.size(column) if np.ndim(column) else None] = column
    return buffer


def upload_logits(device: DeviceHandle, logits: np.ndarray, seqs: int | None = None) -> Tensor:
    """Rows of logits, padded to a multiple of 32: nothing may read past the vocabulary. Then rows of zeros up to
    `seqs`."""
    num_rows, vocab = logits.shape
    padded = np.full((seqs or num_rows, -(-vocab // 32) * 32), 1e30, np.float32)
    padded[:, :vocab] = 0.0
    padded[:num_rows, :vocab] = logits
    return device.upload(padded)


def read_sampled(out: Tensor, num_rows: int | None = None) -> Sampled:
    rows = out.numpy().reshape(-1, OUT_WIDTH)[:num_rows]
    floats = rows.view(np.float32)
    return Sampled(
        rows[:, OUT_TOKEN],
        floats[:, OUT_LOGPROB],
        rows[:, OUT_RANK],
        rows[:, OUT_TOP:OUT_TOP_LOGPROB],
        floats[:, OUT_TOP_LOGPROB:],
    )
