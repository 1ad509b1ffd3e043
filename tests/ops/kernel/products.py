"""Products of models' shapes, and their operands and launches: what scripts/sweep_products.py times, and what
test_rules.py asks the rules about."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinyvllm.config import ModelConfig

ROLES = ("qkv", "attention_out", "gate_up", "down", "lm_head")
ROTATED_BYTES = 220_000_000  # of weights in a graph, several times an L2 cache
MIN_LAUNCHES, MAX_COPIES = 8, 64
BLOCK_ROWS = 32  # of a matrix whose bytes are repeated
TEXT = re.compile(r"(\S+) (\S+) (\d+)x(\d+) T(\d+)")


@dataclass(frozen=True)
class Product:
    """A matrix (N, K) and what is done with it."""

    kind: str  # the format
    role: str
    num_rows: int
    num_cols: int
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.kind} {self.role} {self.num_rows}x{self.num_cols} T{self.num_tokens}"

    @classmethod
    def parse(cls, text: str) -> Product:
        """The product of that name. Raises ValueError for any other text."""
        match = TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} does not name a product, as 'float16 gate_up 28672x4096 T1' does")
        kind, role, *sizes = match.groups()
        return cls(kind, role, *map(int, sizes))


def products_of(config: ModelConfig, kind: str, num_tokens: int) -> Iterator[Product]:
    """The products of a step of a model."""
    hidden, ffn, heads = config.hidden_size, config.ffn_size, config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    sizes = ((qkv, hidden), (hidden, heads), (2 * ffn, hidden), (hidden, ffn), (config.vocab_size, hidden))
    for role, (rows, cols) in zip(ROLES, sizes, strict=True):
        yield Product(kind, role, -(-rows // BLOCK_ROWS) * BLOCK_ROWS, cols, num_tokens)


class Bench:
    """A product's operands on a device, and its launches."""

    def __init__(self, backend: Any, product: Product, *, is_dry: bool = False) -> None:
        """Raises UnsupportedModelError if the matrix does not fit the format. `is_dry`: nothing is allocated."""
        from tinygrad import Tensor, dtypes

        from tinyvllm.model.weights.random import RandomWeights

        self.backend, self.product, tokens = backend, product, product.num_tokens
        rows, cols = product.num_rows, product.num_cols
        block = backend.matrix(RandomWeights(product.kind, seed=0).take("w", (BLOCK_ROWS, cols)))
        self.nbytes = block.nbytes * rows // BLOCK_ROWS
        copies = 1 if is_dry else max(2, min(MAX_COPIES, ROTATED_BYTES // self.nbytes + 1))

        def empty(size: int, dtype: Any) -> Any:
            device = backend.device
            return Tensor.empty(size, dtype=dtype, device=device.name) if is_dry else device.zeros(size, dtype)

        own = [_plane_maker(plane, rows // BLOCK_ROWS, is_dry=is_dry) for plane in block.own_planes]
        shared = block.planes[len(own) :]
        self.matrices = [
            backend.with_maps(
                replace(block, num_rows=rows, used_rows=rows, planes=(*[make() for make in own], *shared))
            )
            for _ in range(copies)
        ]
        self.x = empty(tokens * cols, dtypes.half)
        self.norm_weight, self.out_norm = empty(cols, dtypes.float), empty(rows, dtypes.float)
        self.residual = empty(tokens * rows, dtypes.half)

    def launch(self, matrix: Any) -> Any:
        """The product, and with several rows the sum of its partial products."""
        from tinyvllm.ops.backend import Epilogue, Norm

        product, backend = self.product, self.backend
        is_one, adds = product.num_tokens == 1, product.role in ("attention_out", "down")
        norm = Norm(self.norm_weight, 1e-5) if is_one and not adds else None
        epilogue = Epilogue(
            activation="silu" if product.role == "gate_up" else None, residual=self.residual if adds else None
        )
        (out,) = backend.linear(
            product.role, self._rows(matrix, epilogue), [matrix], product.num_tokens, norm, epilogue
        )
        if is_one or product.role in ("qkv", "gate_up"):
            return out
        if product.role == "lm_head":
            return backend.whole(out)
        return backend._normed_rows(out, Norm(self.out_norm, 1e-5), product.num_tokens)

    def _rows(self, matrix: Any, epilogue: Any) -> Any:
        """x, in the order in which the product reads it if the kernel before writes it so, as all but attention do."""
        product, backend = self.product, self.backend
        is_written = product.num_tokens > 1 and product.role != "attention_out"
        if is_written and backend._takes_order(product.role, [matrix], product.num_tokens, epilogue, backend.mma):
            return backend._held(self.x, product.num_tokens, is_ordered=True)
        return self.x

    def launches(self) -> Callable[[], Any]:
        """Launches with each copy of the matrix."""
        count = max(MIN_LAUNCHES, len(self.matrices))
        return lambda: [self.launch(self.matrices[i % len(self.matrices)]) for i in range(count)][-1].realize()

    def spec(self) -> Any:
        """The spec of the product's kernel, with the values that the rules choose."""
        from tinyvllm.ops.kernel import tuning

        tuning.current.asked = _First()
        try:
            self.launch(self.matrices[0])
        except _Found as found:
            return found.args[0]
        finally:
            tuning.current.asked = None
        raise AssertionError(f"{self.product} has no tunable kernel")


class _Found(Exception):
    """Carries a spec."""


class _First(dict[str, Any]):
    """Stops at the first spec for which choices are asked."""

    def __setitem__(self, key: str, spec: Any) -> None:
        raise _Found(spec)


def _plane_maker(plane: Any, times: int, *, is_dry: bool) -> Callable[[], Any]:
    """Makes a plane of a matrix with so many times the rows."""
    from tinygrad import Tensor

    from tinyvllm.device.handle import upload

    if is_dry:
        return lambda: Tensor.empty(plane.numel() * times, dtype=plane.dtype, device=plane.device)
    values = np.tile(plane.numpy().reshape(-1), times)
    return lambda: upload(values, plane.device)


def values_text(spec: Any) -> str:
    """The values of a spec's knobs, as in the table."""
    return " ".join(str(value) for _, value in spec.values)
