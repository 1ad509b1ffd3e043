"""What files of several families say about experts."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.config import ExpertsKind, ModelConfig
from tinyvllm.storage.values import MAX_LAYERS, MAX_SIZE, Values

MAX_EXPERTS = 1 << 16  # of a layer; the most known are 512
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")  # of config.json


def hf_experts(values: Values, ffn_key: str, top_k_key: str = "num_experts_per_tok") -> ExpertsKind:
    """The numbers and the size in config.json; a family replaces what else its experts have. `ffn_key`: of the size of
    one expert."""
    count_key = next((key for key in COUNT_KEYS if values.get(key) is not None), COUNT_KEYS[0])
    return _experts(values, (count_key, top_k_key, ffn_key))


def gguf_experts(values: Values, ffn_key: str = "expert_feed_forward_length") -> ExpertsKind:
    """The same in a GGUF file's metadata."""
    return _experts(values, ("expert_count", "expert_used_count", ffn_key))


def _experts(values: Values, keys: tuple[str, str, str]) -> ExpertsKind:
    count, top_k = (values.integer(key, at_most=MAX_EXPERTS) for key in keys[:2])
    ffn_size = values.integer(keys[2], at_most=MAX_SIZE)
    if top_k > count:
        values.refuse(keys[1], f"at most {count} ({keys[0]})")
    return ExpertsKind(num_experts=count, top_k=top_k, ffn_size=ffn_size)


def with_groups(experts: ExpertsKind, values: Values, keys: tuple[str, str]) -> ExpertsKind:
    """The experts in groups, of which only the best are chosen from. `keys`: of the number of groups, and of those that
    are chosen from; 1 where a file does not say."""
    num_groups, top_groups = (values.integer(key, 1) for key in keys)
    size = experts.num_experts // num_groups
    if num_groups > 1 and (experts.num_experts % num_groups or size < 2):  # a group's score is the sum of its best two
        values.refuse(keys[0], f"a divisor of the number of experts ({experts.num_experts}), with 2 or more in a group")
    if top_groups > num_groups:
        values.refuse(keys[1], f"at most {num_groups} ({keys[0]})")
    if top_groups * size < experts.top_k:
        values.refuse(keys[1], f"enough groups of {size} experts to choose {experts.top_k} from")
    return replace(experts, num_groups=num_groups, top_groups=top_groups)


def sparse_layers(config: ModelConfig, values: Values) -> tuple[bool, ...]:
    """ModelConfig.with_experts by Qwen's keys: every decoder_sparse_step-th layer, but those in mlp_only_layers."""
    step, dense = (
        values.integer("decoder_sparse_step", 1),
        values.indices("mlp_only_layers", MAX_LAYERS, "a list of layers"),
    )
    flags = tuple((layer + 1) % step == 0 and layer not in dense for layer in range(config.num_layers))
    return () if all(flags) else flags
