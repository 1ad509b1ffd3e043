"""The RMSNorm of a row's queries, all heads together, and of its keys (OLMo 2), on the CPU device's cores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from tinygrad import UOp

from tinyvllm.ops.attention_spec import KEYS, QUERIES, VALUES
from tinyvllm.ops.kernel.body import Body, KernelFn, balanced, cached_kernel, fill, finish

NORM_LANES = 16  # sums of squares that run side by side


@dataclass(frozen=True)
class WholeNormSpec:
    """The queries, keys and values of one core's heads, the first two normed over all heads of the layer. Each core's
    columns are its queries, its keys, its values; they may lie in several parts."""

    num_tokens: int  # T
    eps: float
    parts: tuple[tuple[int, ...], ...]  # of each core, the columns of its parts of qkv
    sections: tuple[tuple[int, int, int], ...]  # of each core, the columns of its queries, keys and values
    core: int  # whose columns are written
    has_bias: bool = False

    @property
    def num_cols(self) -> int:
        """Columns that are written."""
        return sum(self.sections[self.core])

    def total(self, section: int) -> int:
        """Columns of a section in the layer."""
        return sum(sizes[section] for sizes in self.sections)

    def start(self, core: int, section: int) -> int:
        """Where a core's columns of a section begin among the layer's queries, keys and values."""
        return sum(self.total(s) for s in range(section)) + sum(sizes[section] for sizes in self.sections[:core])


@dataclass(frozen=True)
class _Piece:
    """Columns of a section that lie in one buffer (T, width)."""

    buffer: UOp
    width: int
    first: int  # the first of them in the buffer
    count: int
    start: int  # of them among the layer's queries, keys and values
    column: int  # the first of them among the core's columns

    def load(self, token: UOp, bias: UOp | None, i: UOp) -> UOp:
        """Their i-th value, with its bias."""
        value = self.buffer[token * self.width + self.first + i].load()
        return value if bias is None else value + bias[self.start + i].load()


@cached_kernel
def whole_norm_kernel(spec: WholeNormSpec) -> KernelFn:
    """fn(out (T, columns of the core), *parts of each core, weight (queries and keys of the layer)[, bias])."""

    def kernel(out: UOp, *operands: UOp) -> UOp:
        rest, body = list(operands), Body()
        buffers = [[rest.pop(0) for _ in parts] for parts in spec.parts]
        weight, bias = rest[0], rest[1] if spec.has_bias else None
        token = body.loop(spec.num_tokens)

        stores = []
        for section in (QUERIES, KEYS, VALUES):
            scale = None
            if section != VALUES:
                everywhere = [p for core in range(len(buffers)) for p in _pieces(spec, buffers[core], core, section)]
                scale = _scale(body, spec, token, everywhere, bias, section)
            for piece in _pieces(spec, buffers[spec.core], spec.core, section):
                i = body.loop(piece.count)
                value = piece.load(token, bias, i)
                if scale is not None:
                    value = value * scale[0].load() * weight[piece.start + i].load()
                stores.append(out[token * spec.num_cols + piece.column + i].store(value).end(i))
        size = spec.num_tokens * spec.num_cols
        name = f"whole_norm_{spec.num_tokens}x{spec.num_cols}"
        return finish(UOp.group(*stores).end(token), name, ops=4 * size, nbytes=8 * size)

    return kernel


def _pieces(spec: WholeNormSpec, buffers: list[UOp], core: int, section: int) -> Iterator[_Piece]:
    """The columns of a core's section, buffer by buffer."""
    first = sum(spec.sections[core][:section])
    end, begin = first + spec.sections[core][section], 0
    for buffer, width in zip(buffers, spec.parts[core], strict=True):
        a, b = max(first, begin), min(end, begin + width)
        if a < b:
            yield _Piece(buffer, width, a - begin, b - a, spec.start(core, section) + a - first, a)
        begin += width


def _scale(body: Body, spec: WholeNormSpec, token: UOp, pieces: list[_Piece], bias: UOp | None, section: int) -> UOp:
    """A register with 1 / sqrt(mean square + eps) of a section, which lies in `pieces`."""
    sums = fill(body, body.registers(NORM_LANES), 0.0, token)
    for piece in pieces:
        lanes = gcd(piece.count, NORM_LANES)
        k = body.fold(piece.count // lanes)
        inner = sums.after(k)
        values = [piece.load(token, bias, k * lanes + lane) for lane in range(lanes)]
        sums = sums.after(UOp.group(*[inner[i].store(inner[i].load() + v * v) for i, v in enumerate(values)]).end(k))
    mean = balanced(sums[i].load() for i in range(NORM_LANES)) * (1.0 / spec.total(section))
    scale = body.registers(1)
    return scale.after(scale.after(token)[0].store((mean + spec.eps).sqrt().reciprocal()))
