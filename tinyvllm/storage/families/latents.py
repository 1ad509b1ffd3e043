"""What files say about latent attention, and about the experts of the models that have it (DeepSeek, GLM-4.7-Flash)."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.config import LatentKind, ModelConfig
from tinyvllm.storage.hf_rope import rope_values, yarn_magnitude
from tinyvllm.storage.values import Values


def with_hf_latents(config: ModelConfig, values: Values) -> ModelConfig:
    """Raises ModelError for sizes that are missing."""
    latent = LatentKind(
        rank=values.integer("kv_lora_rank"),
        rope_dim=config.head_dim,  # read from qk_rope_head_dim
        nope_dim=values.integer("qk_nope_head_dim"),
        value_dim=values.integer("v_head_dim"),
        query_rank=values.optional_integer("q_lora_rank"),
    )
    scaling, slope = config.rope.scaling, rope_values(values).optional_number("mscale_all_dim")
    factor = 1.0 if scaling is None or not slope else yarn_magnitude(scaling.factor, slope)
    is_interleaved = values.flag("rope_interleave", default=True)
    return with_latents(replace(config, rope=replace(config.rope, is_interleaved=is_interleaved)), latent, factor)


def with_gguf_latents(config: ModelConfig, values: Values) -> ModelConfig:
    """The same from a GGUF file's metadata. Newer files hold the heads' sizes in keys of their own, because they state
    the latents as heads; their multiplier of YaRN's logarithm is a tenth of mscale_all_dim, which equals mscale in all
    models: so cosines and sines have no factor."""
    head_dim = values.integer("attention.key_length_mla", values.optional_integer("attention.key_length"))
    value_dim = values.integer("attention.value_length_mla", values.optional_integer("attention.value_length"))
    rope_dim = config.head_dim  # read from rope.dimension_count
    if head_dim <= rope_dim:
        values.refuse("attention.key_length_mla", f"more than rope.dimension_count ({rope_dim})")
    latent = LatentKind(
        rank=values.integer("attention.kv_lora_rank"),
        rope_dim=rope_dim,
        nope_dim=head_dim - rope_dim,
        value_dim=value_dim,
        query_rank=values.optional_integer("attention.q_lora_rank", at_least=0) or None,
    )
    scaling, slope = config.rope.scaling, values.optional_number("rope.scaling.yarn_log_multiplier")
    factor = 1.0 if scaling is None or not slope else yarn_magnitude(scaling.factor, 10 * slope)
    rope = replace(config.rope, attention_factor=1.0)
    return with_latents(replace(config, rope=rope), latent, factor)


def with_latents(config: ModelConfig, latent: LatentKind, factor: float) -> ModelConfig:
    """`factor`: YaRN's, whose square scores are multiplied by (DeepSeek-V2, 2024, sec. 3.1.4)."""
    head_dim = latent.nope_dim + latent.rope_dim
    return replace(
        config,
        num_kv_heads=config.num_heads,
        head_dim=head_dim,
        rope=replace(config.rope, num_dims=latent.rope_dim),
        score_scale=None if factor == 1.0 else head_dim**-0.5 * factor**2,
        latent=latent,
    )


def dense_first(config: ModelConfig, count: int) -> tuple[bool, ...]:
    """ModelConfig.with_experts of a model whose first `count` layers are dense."""
    flags = tuple(layer >= count for layer in range(config.num_layers))
    return () if all(flags) else flags
