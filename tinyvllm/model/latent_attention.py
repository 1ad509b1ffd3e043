"""Multi-head latent attention (DeepSeek-V2, 2024, sec. 2.1) over latents in the pool: its weights, and its
equations."""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import Tensor

from tinyvllm.config import LatentKind, LayerKind
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.attention import Placed
from tinyvllm.model.loading import Loader
from tinyvllm.ops.backend import Epilogue, Norm, Operations, Step
from tinyvllm.ops.formats.matrix import PANEL, Matrix
from tinyvllm.ops.latent_spec import LatentLayer


@dataclass(frozen=True)
class LatentAttention:
    """`query_down` and its norm: None where queries are products of the hidden state."""

    latent: LatentLayer
    norm: Norm | None
    query_down: Matrix | None  # (query rank, hidden)
    query_norm: Norm | None
    query_up: Matrix  # (H * (nope + rope), query rank), or of the hidden state
    latent_down: Matrix  # (rank + rope, hidden)
    attention_out: Matrix  # (hidden, H * value)
    residual_scale: float

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        roles = {
            "query_down": self.query_down,
            "query_up": self.query_up,
            "latent_down": self.latent_down,
            "key_up": self.latent.key_up,
            "value_up": self.latent.value_up,
            "attention_out": self.attention_out,
        }
        return {role: (matrix,) for role, matrix in roles.items() if matrix is not None}

    def run(self, ops: Operations, x: Tensor, step: Step) -> Tensor:
        tokens = step.num_tokens
        if self.query_down is None:
            queries, latents = ops.linear("query_up", x, [self.query_up, self.latent_down], tokens, self.norm)
        else:
            low, latents = ops.linear("query_down", x, [self.query_down, self.latent_down], tokens, self.norm)
            (queries,) = ops.linear("query_up", low, [self.query_up], tokens, self.query_norm)
        heads = ops.attend_latent(queries, latents, self.latent, step)  # (T * H * value,)
        epilogue = Epilogue(scale=self.residual_scale, residual=x)
        return ops.linear("attention_out", heads, [self.attention_out], tokens, None, epilogue)[0]


def load_latent_attention(load: Loader, kind: LayerKind, placed: Placed, norm: str | None) -> LatentAttention:
    """`norm`: the name of the norm before it. Raises UnsupportedModelError for sizes that kernels do not read."""
    latent, heads, ops, hidden = kind.latent, kind.num_heads, load.backend, load.config.hidden_size
    assert latent is not None and placed.rope is not None
    _require_panels(kind, latent)
    prefix = f"model.layers.{placed.index}"
    attention, query_cols = f"{prefix}.self_attn", latent.query_rank or hidden

    def by_head(name: str, rows: int, cols: int) -> Matrix:
        """A matrix whose rows cores share by heads."""
        (matrix,) = ops.stacked([load.take(f"{attention}.{name}.weight", heads * rows, cols)], heads)
        return matrix

    query_down = query_norm = None
    if latent.query_rank is not None:
        query_down = ops.matrix(load.take(f"{attention}.q_a_proj.weight", latent.query_rank, hidden))
        weight = load.norm(f"{attention}.q_a_layernorm.weight", size=latent.query_rank).weight
        query_norm = Norm(weight, latent.norm_eps)
    return LatentAttention(
        latent=LatentLayer(
            index=placed.index,
            kind=kind,
            key_up=by_head("k_b_proj", latent.rank, latent.nope_dim),
            value_up=by_head("v_b_proj", latent.value_dim, latent.rank),
            norm=load.norm(f"{attention}.kv_a_layernorm.weight", size=latent.rank).weight,
            rope=placed.rope,
            pool_group=placed.pool_group,
        ),
        norm=load.optional_norm(prefix, norm),
        query_down=query_down,
        query_norm=query_norm,
        query_up=by_head("q_proj" if latent.query_rank is None else "q_b_proj", kind.head_dim, query_cols),
        latent_down=ops.matrix(load.take(f"{attention}.kv_a_proj_with_mqa.weight", latent.stored_dim, hidden)),
        attention_out=ops.matrix(load.take(f"{attention}.o_proj.weight", hidden, heads * latent.value_dim)),
        residual_scale=load.config.residual_scale,
    )


def _require_panels(kind: LayerKind, latent: LatentKind) -> None:
    sizes = {
        "kv_lora_rank": latent.rank,
        "qk_nope_head_dim": latent.nope_dim,
        "v_head_dim": latent.value_dim,
        "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)": kind.q_size,
    }
    for name, size in sizes.items():
        if size % PANEL:
            raise UnsupportedModelError(f"{name} is {size}: latent attention needs a multiple of {PANEL}")
