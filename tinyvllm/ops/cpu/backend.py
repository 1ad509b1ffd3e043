"""The CPU device's backend: packed panels, five fused kernels a layer when decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from tinygrad import Tensor, UOp

from tinyvllm.arrays import HostMatrix, stack_rows, take_rows
from tinyvllm.device.handle import FLOATS, DeviceHandle, has_many_registers
from tinyvllm.errors import DeviceError, UnsupportedModelError
from tinyvllm.ops.backend import AttentionShape, KVPool, Norm, gate_over_up, head_tables, sample_rows
from tinyvllm.ops.cpu.attention import AttentionSpec, attention_kernel, write_kv_kernel
from tinyvllm.ops.cpu.linear import (
    STAGED_ROWS,
    EmbedSpec,
    LinearSpec,
    NormSpec,
    embed_kernel,
    join_kernel,
    linear_kernel,
    rms_norm_kernel,
)
from tinyvllm.ops.formats.matrix import HALF, PANEL, Matrix, pack, share_rows
from tinyvllm.ops.kernel.body import Body, KernelFn, cached_kernel, empty, finish, run_kernel
from tinyvllm.ops.kernel.tuning import choose
from tinyvllm.ops.sampling.logits_processing import SamplingState
from tinyvllm.ops.step_inputs import StepLayout


@dataclass(frozen=True)
class Shares:
    """An activation whose columns lie on several cores: (T * width,) each, side by side in a row's order."""

    tensors: tuple[Tensor, ...]
    widths: tuple[int, ...]


Activation: TypeAlias = Tensor | Shares  # a Tensor where one core does it all


class CpuBackend:
    """Activations are float32; dense matrices stay as stored unless `dtype` recasts them.

    Several cores: each is a device of tinygrad's, owns some rows of every matrix and whole KV heads with their part of
    the pool, and writes its columns of every activation. A kernel runs on the core of its first output and reads the
    other cores' columns where they lie.
    """

    def __init__(
        self, device: DeviceHandle, dtype: str | None, shape: AttentionShape | None = None, *, dequantize: bool = False
    ) -> None:
        """`shape`: of the model; without it one core does everything."""
        self.device = device
        self.dtype = dtype
        self.dequantize = dequantize
        self.tile_rows = 4 if has_many_registers() else 2
        self.num_kv_heads = shape.num_kv_heads if shape is not None else 1
        self.cores = device.cores[: _count_cores(len(device.cores), shape)] or (device.name,)

    # -- weights ------------------------------------------------------------------------------------------------------

    def matrix(self, host: HostMatrix) -> Matrix:
        """Rows shared out by panels."""
        rows = host.shape[0]
        bounds = self._bounds(-(-rows // PANEL))
        return share_rows(
            [self._pack(take_rows(host, np.arange(a * PANEL, min(b * PANEL, rows))), core) for (a, b), core in bounds]
        )

    def stacked(self, hosts: Sequence[HostMatrix]) -> tuple[Matrix, ...]:
        """One matrix is shared out by panels; several (q, k, v) by KV heads, so that each core's rows attend alone."""
        for host in hosts:
            _require_panels(host)
        if len(hosts) == 1:
            return (self.matrix(hosts[0]),)
        by_core = []
        for (a, b), core in self._bounds(self.num_kv_heads):
            mine = stack_rows([_take_share(host, a, b, self.num_kv_heads) for host in hosts])
            by_core.append([self._pack(part, core) for part in mine])
        return tuple(share_rows(parts) for parts in zip(*by_core, strict=True))

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """Panels of 16 gate rows and the 16 up rows that belong to them, shared out by panels of 32 columns."""
        _require_panels(gate)
        both, rows, parts = gate_over_up(gate, up), gate.shape[0], []
        for (a, b), core in self._bounds(rows // PANEL):
            index = np.arange(a * PANEL, b * PANEL).reshape(-1, 1, HALF)
            order = np.concatenate([index, index + rows], axis=1).reshape(-1)
            parts.append(self._pack(take_rows(both, order), core))
        return share_rows(parts)

    def make_pool(self, num_layers: int, num_blocks: int, block_size: int, shape: AttentionShape, dtype: str) -> KVPool:
        """Each core's KV heads in tensors of their own."""
        per_head = num_blocks * block_size * shape.head_dim

        def layer() -> Any:
            tensors = tuple(
                self.device.zeros((b - a) * per_head, FLOATS[dtype], core)
                for (a, b), core in self._bounds(shape.num_kv_heads)
            )
            return tensors if len(tensors) > 1 else tensors[0]

        return KVPool([layer() for _ in range(num_layers)], [layer() for _ in range(num_layers)], num_blocks, dtype)

    def _bounds(self, count: int) -> list[tuple[tuple[int, int], str]]:
        """`count` units shared out to the cores as evenly as it goes: [((first, behind the last), core)]."""
        num = min(len(self.cores), count)
        return [((i * count // num, (i + 1) * count // num), self.cores[i]) for i in range(num)]

    def _pack(self, host: HostMatrix, core: str) -> Matrix:
        return pack(host, "panel", self.dtype, core, dequantize=self.dequantize)

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """float16 unless told: half the bytes of float32, which decoding at long contexts waits for.

        Raises DeviceError for bfloat16: not every C compiler has the type (clang 14 on x86 has not)."""
        if wanted == "bfloat16":
            raise DeviceError("--kv-cache-dtype is 'bfloat16', which the CPU device has not: give float16 or float32")
        return "float16" if wanted == "auto" else wanted

    # -- operations ---------------------------------------------------------------------------------------------------

    def embed(self, table: Matrix, inputs: Tensor, layout: StepLayout, newest: Tensor | None = None) -> Activation:
        tokens, planes = layout.num_tokens, [plane for part in table.parts for plane in part.planes]
        rows, sources = tuple(part.used_rows for part in table.parts), [inputs] if newest is None else [inputs, newest]
        outs, widths = [], []
        for (a, b), core in self._bounds(table.num_cols // PANEL):
            first, cols = a * PANEL, (b - a) * PANEL
            at = layout.offset("token_ids")
            spec = EmbedSpec(table.format, tokens, rows, table.num_cols, first, cols, at, newest is not None)
            outs += run_kernel(embed_kernel(spec), [empty(tokens * cols, device=core)], [*sources, *planes])
            widths.append(cols)
        return _share(outs, widths)

    def norm_linear(
        self, name: str, x: Activation, norm: Norm, matrices: Sequence[Matrix], num_tokens: int
    ) -> list[Activation]:
        normed, eps = self._normed(x, norm, matrices[0].num_cols, num_tokens)
        return [self._linear(name, normed, matrix, num_tokens, eps, norm) for matrix in matrices]

    def norm_gated(self, name: str, x: Activation, norm: Norm, matrix: Matrix, num_tokens: int) -> Activation:
        normed, eps = self._normed(x, norm, matrix.num_cols, num_tokens)
        return self._linear(name, normed, matrix, num_tokens, eps, norm, epilogue="silu")

    def linear_add(self, name: str, x: Activation, matrix: Matrix, residual: Activation, num_tokens: int) -> Activation:
        inputs = [x] * len(matrix.parts)
        return self._linear(name, inputs, matrix, num_tokens, None, None, epilogue="residual", residual=residual)

    def attend(
        self,
        qkv: Sequence[Activation],
        widths: Sequence[int],
        shape: AttentionShape,
        pool: KVPool,
        layer: int,
        inputs: Tensor,
        rope: Tensor,
        layout: StepLayout,
        *,
        is_decode: bool,
        head_norm: Norm | None = None,
    ) -> Activation:
        tables, eps = head_tables(rope, head_norm)
        outs, out_widths = [], []
        keys, values = _tensors(pool.keys[layer]), _tensors(pool.values[layer])
        group = shape.num_heads // shape.num_kv_heads
        for i, ((a, b), core) in enumerate(self._bounds(shape.num_kv_heads)):
            mine = [_tensors(part)[i] for part in qkv]
            cols = tuple(_widths(part, width)[i] for part, width in zip(qkv, widths, strict=True))
            spec = AttentionSpec(
                layout, (b - a) * group, b - a, shape.head_dim, pool.num_blocks, is_decode, cols, pool.dtype, eps
            )
            out = empty(layout.num_tokens * spec.num_heads * shape.head_dim, device=core)
            outs.append(self._attend(spec, out, keys[i], values[i], [inputs, *tables, *mine]))
            out_widths.append(spec.num_heads * shape.head_dim)
        return _share(outs, out_widths)

    def take_rows(self, x: Activation, inputs: Tensor, layout: StepLayout, num_cols: int) -> Activation:
        outs, widths = [], _widths(x, num_cols)
        for tensor, cols in zip(_tensors(x), widths, strict=True):
            out = empty(layout.num_seqs * cols, device=str(tensor.device))
            outs += run_kernel(take_rows_kernel(layout, cols), [out], [tensor, inputs])
        return _share(outs, widths)

    def parts_of(self, x: Activation) -> Sequence[Tensor]:
        return _tensors(x)

    def join(self, logits: Activation, stride: int, layout: StepLayout) -> Tensor:
        if not isinstance(logits, Shares):
            return logits
        joined = empty(layout.num_seqs * stride, device=self.device.name)
        return run_kernel(join_kernel(layout.num_seqs, logits.widths), [joined], logits.tensors)[0]

    def sample(
        self,
        logits: Activation,
        vocab_size: int,
        stride: int,
        inputs: Tensor,
        layout: StepLayout,
        out: Tensor | None = None,
        state: SamplingState | None = None,
    ) -> Tensor:
        logits = self.join(logits, stride, layout)
        return sample_rows(self.device, logits, vocab_size, stride, inputs, layout, out, state)

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _normed(self, x: Activation, norm: Norm, cols: int, num_tokens: int) -> tuple[list[Activation], float | None]:
        """Each core's input of a product. Few rows: x itself, which the product normalises (by the epsilon that is
        returned). Many: one pass by each core before all products of the same input."""
        if num_tokens <= STAGED_ROWS:
            return [x] * len(self.cores), norm.eps
        spec = NormSpec(num_tokens, cols, norm.eps, _widths(x, cols))
        outs = [empty(num_tokens * cols, device=core) for core in self.cores]
        return [run_kernel(rms_norm_kernel(spec), [out], [*_tensors(x), norm.weight])[0] for out in outs], None

    def _linear(
        self,
        name: str,
        inputs: Sequence[Activation],
        matrix: Matrix,
        num_tokens: int,
        eps: float | None,
        norm: Norm | None,
        *,
        epilogue: str = "none",
        residual: Activation | None = None,
    ) -> Activation:
        """Each core's rows of the matrix, times its input."""
        weight = [norm.weight] if norm is not None and eps is not None else []
        outs, widths = [], []
        for i, part in enumerate(matrix.parts):
            x_cols = _widths(inputs[i], matrix.num_cols)
            spec = LinearSpec(
                name, part.format, num_tokens, part.num_rows, part.num_cols, eps, epilogue, x_cols, self.tile_rows
            )
            spec = choose(spec)
            out = empty(num_tokens * spec.out_cols, device=self.cores[i])
            operands = [*part.planes, *_tensors(inputs[i]), *weight]
            if residual is not None:
                operands.append(_tensors(residual)[i])
            outs += run_kernel(linear_kernel(spec), [out], operands)
            widths.append(spec.out_cols)
        return _share(outs, widths)

    def _attend(self, spec: AttentionSpec, out: Tensor, keys: Tensor, values: Tensor, common: list[Tensor]) -> Tensor:
        if spec.fused_write:
            return run_kernel(attention_kernel(spec), [out, keys, values], common)[0]
        keys, values = run_kernel(write_kv_kernel(spec), [keys, values], common)
        return run_kernel(attention_kernel(spec), [out], [keys, values, *common])[0]


def _share(tensors: Sequence[Tensor], widths: Sequence[int]) -> Activation:
    return tensors[0] if len(tensors) == 1 else Shares(tuple(tensors), tuple(widths))


def _tensors(x: Any) -> tuple[Tensor, ...]:
    """Each core's tensor, of an activation or of a layer's pool."""
    if isinstance(x, Shares):
        return x.tensors
    return x if isinstance(x, tuple) else (x,)


def _widths(x: Activation, cols: int) -> tuple[int, ...]:
    return x.widths if isinstance(x, Shares) else (cols,)


def _take_share(host: HostMatrix, first: int, last: int, num_units: int) -> HostMatrix:
    """The rows of units [first, last) of `num_units` that the matrix consists of."""
    unit = host.shape[0] // num_units
    return take_rows(host, np.arange(first * unit, last * unit))


def _count_cores(available: int, shape: AttentionShape | None) -> int:
    """The most cores among which the KV heads can be shared so that everybody's rows of k and v fill whole panels."""
    if shape is None:
        return 1
    heads, dim = shape.num_kv_heads, shape.head_dim

    def fills_panels(num: int) -> bool:
        return all(((i + 1) * heads // num - i * heads // num) * dim % PANEL == 0 for i in range(num))

    return next((num for num in range(min(available, heads), 1, -1) if fills_panels(num)), 1)


def _require_panels(host: HostMatrix) -> None:
    """Matrices whose rows feed another operation must fill their panels: only the head may be padded."""
    if host.shape[0] % PANEL:
        raise UnsupportedModelError(f"a projection has {host.shape[0]} rows, which is no multiple of {PANEL}")


@cached_kernel
def take_rows_kernel(layout: StepLayout, num_cols: int) -> KernelFn:
    """fn(out (R, columns), x (T, columns), inputs): rows logit_rows of x."""

    def kernel(out: UOp, x: UOp, inputs: UOp) -> UOp:
        body = Body()
        seq, col = body.loop(layout.num_seqs), body.loop(num_cols)
        row = inputs[layout.offset("logit_rows") + seq].load().maximum(0).minimum(layout.num_tokens - 1)
        store = out[seq * num_cols + col].store(x[row * num_cols + col].load())
        return finish(
            store.end(col, seq), f"take_rows_{layout.num_seqs}x{num_cols}", nbytes=8 * layout.num_seqs * num_cols
        )

    return kernel
