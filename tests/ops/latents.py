"""Cases of latent attention: shapes, and one step of a backend over a pool of latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.builders import encode_floats
from tests.ops.builders import make_host, make_step_of, normal
from tinyvllm.config import LatentKind, LayerKind, Rope
from tinyvllm.device.handle import FLOATS
from tinyvllm.model.rope import rope_table
from tinyvllm.ops.backend import Backend, pool_groups
from tinyvllm.ops.latent_spec import LatentLayer
from tinyvllm.ops.step_inputs import StepLayout


@dataclass(frozen=True)
class Case:
    """A shape: H heads of (nope + rope) and value dimensions over latents of `rank`."""

    heads: int
    rank: int
    rope: int
    nope: int
    value: int
    layout: StepLayout
    is_decode: bool
    dtype: str = "float32"  # of the pool
    weights: str = "float32"  # of the matrices
    is_interleaved: bool = True

    @property
    def kind(self) -> LayerKind:
        dim = self.nope + self.rope
        rope = Rope(1000.0, num_dims=self.rope, is_interleaved=self.is_interleaved)
        latent = LatentKind(self.rank, self.rope, self.nope, self.value, norm_eps=0.05)
        return LayerKind(self.heads, self.heads, dim, rope, latent=latent)

    @property
    def name(self) -> str:
        step = f"{'decode' if self.is_decode else 'mixed'}{self.layout.num_tokens}"
        return f"{step}-{self.heads}x{self.nope}+{self.rope}x{self.value}-{self.rank}-{self.dtype}-{self.weights}"


@dataclass(frozen=True)
class Result:
    """What attention returned, (T, H * value), and the pool's latents (slots, rank + rope) after it."""

    out: np.ndarray
    latents: np.ndarray


def make_history(case: Case) -> np.ndarray:
    """Latents of every slot of the pool, of numbers that its dtype holds exactly."""
    slots = (case.layout.num_seqs * case.layout.max_blocks + 1) * case.layout.block_size
    return encode_floats(normal(slots, case.rank + case.rope, seed=1), case.dtype).astype(np.float32)


def make_layer(ops: Backend, case: Case) -> LatentLayer:
    positions = case.layout.max_blocks * case.layout.block_size
    rope = case.kind.rope
    assert rope is not None
    hosts = [
        make_host(case.weights, case.heads * rows, cols, seed)
        for rows, cols, seed in ((case.rank, case.nope, 4), (case.value, case.rank, 5))
    ]
    (key_up,), (value_up,) = (ops.stacked([host], case.heads) for host in hosts)
    return LatentLayer(
        index=0,
        kind=case.kind,
        key_up=key_up,
        value_up=value_up,
        norm=ops.device.upload(1 + 0.3 * normal(case.rank, seed=6)),
        rope=ops.device.upload(rope_table(rope, case.rope, positions)),
    )


def attend(ops: Backend, case: Case, buffer: np.ndarray, history: np.ndarray) -> Result:
    """Run one step over a pool that holds `history`."""
    size, tokens = case.layout.block_size, case.layout.num_tokens
    pool = ops.make_pool(pool_groups([case.kind]), len(history) // size, size, case.dtype)
    assert not pool.values
    pool.keys[0] = ops.device.upload(history).cast(FLOATS[case.dtype]).contiguous().realize()
    queries = ops.device.upload(normal(tokens, case.kind.q_size, seed=2))
    latents = ops.device.upload(2.0 * normal(tokens, case.rank + case.rope, seed=3))
    step = make_step_of(ops, case.layout, buffer, pool, is_decode=case.is_decode)
    out = ops.attend_latent(queries, latents, make_layer(ops, case), step)
    parts = [part.float().numpy().reshape(tokens, -1) for part in ops.parts_of(out)]
    (stored,) = pool.tensors
    return Result(np.concatenate(parts, axis=1), stored.float().numpy().reshape(history.shape))
