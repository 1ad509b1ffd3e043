"""How the pool gets its size, and what is said when it cannot."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from tinyvllm.config import EngineConfig, ExpertsKind, LayerKind, Limits, MemoryUse, ModelConfig, Rope, RopeScaling
from tinyvllm.errors import CapacityError, TinyvllmError
from tinyvllm.execution.capacity import GIB, KVGroup, MemoryFacts, plan_capacity, scratch_bytes

MODEL = ModelConfig(
    architecture="llama",
    num_layers=1,
    hidden_size=64,
    ffn_size=64,
    num_heads=1,
    num_kv_heads=1,
    head_dim=64,
    vocab_size=32,
    max_position=2048,
    rope=Rope(10000.0),
    norm_eps=1e-5,
    tie_embeddings=True,
)
# 64 KiB a token, so 1 MiB a block of 16; 4 GiB x 0.5 - 1 GiB leave 1024 blocks
MEMORY = MemoryFacts(free_bytes=4 * GIB, share=0.5, weight_bytes=GIB, kv_groups=(KVGroup(1 << 16),))


def plan(memory: MemoryFacts = MEMORY, **config: Any) -> Any:
    limits = Limits(config.get("max_num_seqs", 16), 256)
    return plan_capacity(EngineConfig("tiny", **config), limits, MODEL, memory)


def test_memory_left_by_the_weights_becomes_blocks() -> None:
    capacity = plan(max_num_seqs=16)
    assert capacity.num_blocks == 1024
    assert capacity.num_tokens == 1023 * 16
    assert (capacity.max_model_len, capacity.max_num_seqs, capacity.max_num_batched_tokens) == (2048, 16, 256)
    assert capacity.explanation == (
        "4.00 GiB free x 0.50 = 2.00 GiB, less 1.00 GiB of weights and 0.00 GiB for a step's intermediate values: "
        "room for 1024 blocks of 1.00 MiB",
        "1023 blocks of 16 tokens hold 16368 tokens; max_model_len 2048",
    )


def test_a_steps_intermediate_values_have_their_place() -> None:
    assert plan(replace(MEMORY, scratch_bytes=GIB // 2)).num_blocks == 512
    limits, fewer = Limits(256, 8192), Limits(16, 256)
    assert scratch_bytes(limits, MODEL) > 16 * scratch_bytes(fewer, MODEL)


def test_the_widest_layer_decides_how_much_intermediate_values_take() -> None:
    narrow, limits = LayerKind(num_heads=1, num_kv_heads=1, head_dim=64), Limits(16, 256)
    wide = LayerKind(num_heads=32, num_kv_heads=8, head_dim=64)
    mixed = replace(MODEL, num_layers=2, layer_kinds=(narrow, wide))
    assert scratch_bytes(limits, mixed) == scratch_bytes(limits, replace(MODEL, num_heads=32, num_kv_heads=8))
    # the results of 8 experts for every token, as a kernel's output and as the next one's input; 32 columns of each,
    # their places, and 64 products of the router, all twice; and in each layer the ids
    sparse, hidden = replace(MODEL, experts=ExpertsKind(64, 8, 32)), MODEL.hidden_size
    more = scratch_bytes(limits, sparse) - scratch_bytes(limits, replace(MODEL, ffn_size=4 * hidden))
    assert more == 4 * 256 * (2 * (8 * 36 + 64) + 9 * MODEL.num_layers)


def test_no_more_blocks_than_all_sequences_can_use() -> None:
    capacity = plan(max_num_seqs=4)
    assert capacity.num_blocks == 4 * 2048 // 16 + 1
    assert "room for 1024 blocks of 1.00 MiB; 4 sequences can use 513" in capacity.explanation[0]
    assert plan(max_num_seqs=4, max_model_len=100).num_blocks == 4 * 7 + 1, "a block begun counts"


def test_an_override_is_taken_as_it_is() -> None:
    capacity = plan(num_gpu_blocks_override=300)
    assert capacity.num_blocks == 300
    assert capacity.explanation[0] == "--num-gpu-blocks-override gives 300 blocks of 1.00 MiB"


def test_an_override_beyond_the_memory_is_refused_with_the_numbers() -> None:
    memory = replace(MEMORY, max_share=0.9)  # 3.6 GiB, of which 1 is the weights'
    assert plan(memory, num_gpu_blocks_override=2662).num_blocks == 2662
    message = "2663 blocks of 1.00 MiB, 2.60 GiB, but of 4.00 GiB free at most 0.9 may be used, 1.00 GiB of it for"
    with pytest.raises(CapacityError, match=re.escape(message) + " weights: give at most 2662 blocks"):
        plan(memory, num_gpu_blocks_override=2663)


def test_a_length_that_was_not_asked_for_is_cut_to_what_fits() -> None:
    capacity = plan(num_gpu_blocks_override=11)
    assert capacity.max_model_len == 160
    assert capacity.explanation[1] == (
        "10 blocks of 16 tokens hold 160 tokens; max_model_len 160 (the model's 2048 do not fit)"
    )


def test_a_length_that_was_asked_for_and_does_not_fit_is_refused_with_the_numbers() -> None:
    message = (
        "one sequence of --max-model-len 1000 tokens needs 63 blocks, but the pool has 10 (160 tokens): "
        "--num-gpu-blocks-override gives 11 blocks of 1.00 MiB. "
        "Lower --max-model-len to 160, or raise --gpu-memory-utilization or --num-gpu-blocks-override"
    )
    with pytest.raises(CapacityError, match=re.escape(message)):
        plan(num_gpu_blocks_override=11, max_model_len=1000)
    assert plan(num_gpu_blocks_override=64, max_model_len=1000).max_model_len == 1000


@pytest.mark.parametrize("weight_bytes", [2 * GIB, 2 * GIB - (1 << 20), 5 * GIB])
def test_no_room_after_the_weights_is_refused_with_the_numbers(weight_bytes: int) -> None:
    """One block is not enough: the first is the dummy."""
    with pytest.raises(CapacityError) as error:
        plan(replace(MEMORY, weight_bytes=weight_bytes))
    text = str(error.value)
    assert text.startswith("no room for KV blocks: 4.00 GiB free x 0.50 = 2.00 GiB, less")
    assert f"{weight_bytes / GIB:.2f} GiB of weights" in text
    assert "raise --gpu-memory-utilization" in text


def test_longropes_context_is_the_original_one_unless_more_is_asked_for() -> None:
    scaling = RopeScaling("longrope", original_max_position=512, short_factors=(1.0,) * 32, long_factors=(2.0,) * 32)
    model = replace(MODEL, rope=Rope(10000.0, scaling))

    def length(**config: Any) -> int:
        return plan_capacity(EngineConfig("tiny", **config), Limits(16, 256), model, MEMORY).max_model_len

    assert (length(), length(max_model_len=2048)) == (512, 2048)


def test_a_length_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(TinyvllmError, match="--max-model-len is 4096, but the model was trained for 2048 tokens"):
        plan(max_model_len=4096)


# -- groups with windows -----------------------------------------------------------------------------------------------

# 16 KiB a token that keeps all, 48 KiB a token that keeps 512: blocks of 0.25 and 0.75 MiB
WINDOWS = replace(MEMORY, kv_groups=(KVGroup(1 << 14), KVGroup(3 << 14, 512)))


def num_bytes(capacity: Any, memory: MemoryFacts) -> int:
    groups = zip(capacity.groups, memory.kv_groups, strict=True)
    return sum(16 * group.num_blocks * kv_group.bytes_per_token for group, kv_group in groups)


def test_a_windows_group_has_a_quarter_of_the_tokens_and_the_rest_goes_to_the_others() -> None:
    capacity = plan(WINDOWS, max_num_seqs=64)
    (group,) = capacity.other_groups
    assert capacity.num_blocks == 2240 and (group.num_blocks, group.window) == (596, 512)
    assert GIB * 0.98 < num_bytes(capacity, WINDOWS) <= GIB
    assert capacity.max_model_len == 2048
    assert capacity.explanation[0].endswith(
        "room for 2240 blocks of 0.25 MiB, with 596 of 0.75 MiB for windows of 512 tokens"
    )
    assert capacity.explanation[2] == ("layers with a window of 512 tokens: 595 blocks of 0.75 MiB, 27% of the others'")


def test_a_windows_group_has_no_more_than_all_sequences_can_use() -> None:
    capacity = plan(WINDOWS, max_num_seqs=4)
    (group,) = capacity.other_groups
    assert capacity.num_blocks == 4 * 128 + 1 and group.num_blocks == 2 * 4 * 33 + 18
    many = plan(replace(WINDOWS, kv_groups=(KVGroup(1 << 10), KVGroup(3 << 10, 16))), max_num_seqs=64)
    assert many.other_groups[0].num_blocks == 2 * 64 * 2 + 18
    assert "the windows of 64 sequences and of as many cached ones, and a step's tokens" in many.explanation[2]


def test_a_windows_group_has_at_least_one_window_and_a_chunk() -> None:
    capacity = plan(WINDOWS, num_gpu_blocks_override=60)
    assert capacity.other_groups[0].num_blocks == 51, "32 and a begun one, 16 of a step's tokens, and the dummy"
    assert capacity.explanation[0] == (
        "--num-gpu-blocks-override gives 60 blocks of 0.25 MiB, with 51 of 0.75 MiB for windows of 512 tokens"
    )
    small = plan(WINDOWS, num_gpu_blocks_override=40)
    assert small.other_groups[0].num_blocks == 40 and "as many as the others have" in small.explanation[2]


def test_windows_give_way_to_a_length_that_was_asked_for() -> None:
    narrow = replace(WINDOWS, kv_groups=(KVGroup(1 << 14), KVGroup(3 << 14, 128)))
    memory = replace(narrow, weight_bytes=2 * GIB - 60 * (1 << 20))
    assert plan(memory).max_model_len == 1552 and plan(memory).other_groups[0].num_blocks == 46
    asked = plan(memory, max_model_len=2048)
    assert asked.max_model_len == 2048 and asked.other_groups[0].num_blocks < plan(memory).other_groups[0].num_blocks
    assert num_bytes(asked, memory) <= 60 << 20
    with pytest.raises(CapacityError, match="one sequence of --max-model-len 2048 tokens needs 128 blocks"):
        plan(replace(narrow, weight_bytes=2 * GIB - 50 * (1 << 20)), max_model_len=2048)


def test_without_layers_that_keep_all_tokens_the_length_is_the_models() -> None:
    memory = replace(MEMORY, kv_groups=(KVGroup(1 << 16, 128),))
    capacity = plan(memory, num_gpu_blocks_override=30)
    assert capacity.window == 128 and not capacity.other_groups and capacity.max_model_len == 2048
    assert capacity.max_chunk == 256
    assert capacity.explanation[1] == (
        "29 blocks of 16 tokens hold 464 tokens, of which a sequence keeps a window of 128; max_model_len 2048"
    )
    assert plan(memory, max_num_seqs=4).num_blocks == 2 * 4 * 9 + 18, "four windows, four cached ones and a chunk"
    assert plan(memory, num_gpu_blocks_override=9).max_model_len == 128, "no room for a window that begins in a block"


# -- recurrent states --------------------------------------------------------------------------------------------------

STATES = replace(MEMORY, state_bytes=4 << 20)  # as much as four blocks


def all_bytes(capacity: Any, memory: MemoryFacts) -> int:
    return num_bytes(capacity, memory) + capacity.num_state_slots * memory.state_bytes


def test_states_have_slots_for_all_sequences_and_two_checkpoints_of_each() -> None:
    capacity = plan(STATES, max_num_seqs=16)
    assert (capacity.num_state_slots, capacity.checkpoint_interval) == (49, 32)
    assert capacity.num_blocks == 816 and GIB * 0.97 < all_bytes(capacity, STATES) <= GIB
    assert capacity.explanation[0].endswith("room for 816 blocks of 1.00 MiB, and 49 state slots of 4.00 MiB")
    assert capacity.explanation[2] == (
        "48 state slots of 4.00 MiB for recurrent layers: 16 for sequences and 32 for checkpoints of cached prefixes, "
        "one for each 32 blocks of a long prompt"
    )
    assert capacity.memory == MemoryUse(weights=GIB, kv_groups=(816 << 20,), state_slot=4 << 20)


def test_without_prefix_caching_each_sequence_has_one_slot() -> None:
    capacity = plan(STATES, max_num_seqs=16, enable_prefix_caching=False)
    assert capacity.num_state_slots == 17
    assert capacity.explanation[2] == "16 state slots of 4.00 MiB for recurrent layers: one for each sequence"


def test_a_large_pool_has_a_checkpoint_for_each_prefix_that_it_may_hold() -> None:
    memory = replace(STATES, kv_groups=(KVGroup(1 << 10),))
    capacity = plan(memory, max_num_seqs=64)
    assert capacity.num_blocks == 64 * 128 + 1 and capacity.num_state_slots == 220, "the memory that blocks leave"
    assert plan(memory, max_num_seqs=8).num_state_slots == 1 + 8 + 8 * 2048 // 256, "one for each turn"
    assert plan(memory, max_num_seqs=1).num_state_slots == 1 + 1 + 8
    capacity = plan(replace(memory, state_bytes=1 << 16), max_num_seqs=4, num_gpu_blocks_override=40 * 256)
    assert capacity.num_state_slots == 1 + 4 + 40, "4096 tokens each"
    assert plan(replace(memory, state_bytes=600 << 10), max_num_seqs=4).checkpoint_interval == 64, "as many bytes"


def test_states_take_half_of_the_memory_unless_the_rest_suffices() -> None:
    large = replace(STATES, state_bytes=64 << 20)
    capacity = plan(large, max_num_seqs=16)
    assert (capacity.num_blocks, capacity.num_state_slots, capacity.max_num_seqs) == (512, 8, 16)
    assert capacity.explanation[2] == (
        "7 state slots of 64.00 MiB for recurrent layers: at most 7 of 16 sequences run at once; checkpoints have what "
        "they leave"
    )
    short = plan(large, max_num_seqs=16, max_model_len=100)
    assert short.num_blocks == 16 * 7 + 1 and short.num_state_slots == (1024 - 113) // 64 > 8


def test_states_give_way_to_a_length_that_was_asked_for() -> None:
    memory = replace(STATES, weight_bytes=2 * GIB - (140 << 20))
    assert plan(memory).max_model_len < 2048
    asked = plan(memory, max_model_len=2048)
    assert asked.max_model_len == 2048 and asked.num_state_slots == 2 and all_bytes(asked, memory) <= 140 << 20


def test_no_room_for_one_sequences_state_is_refused_with_the_numbers() -> None:
    with pytest.raises(CapacityError, match=r"room for 0 blocks of .* 2 state slots of 600"):
        plan(replace(STATES, state_bytes=600 << 20))
