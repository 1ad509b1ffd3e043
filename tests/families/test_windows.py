"""A tiny Gemma 3 whose windows' group of blocks holds little more than a window: what it holds, and what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.families.recipe import write_hf
from tests.families.recipes import RECIPES
from tests.families.test_tiny import ENGINE, GREEDY, check, read_cases
from tinyvllm import LLM
from tinyvllm.config import BlockGroup
from tinyvllm.ops.backend import KVPool
from tinyvllm.scheduling.block_manager import BlockManager


def spoil_free_blocks(manager: BlockManager, pool: KVPool, layers_of: list[list[int]], device: Any) -> None:
    """Write NaN to each block that no request holds, the dummy included, and to the layers of its group alone."""
    for index, (group, layers) in enumerate(zip(manager.pools, layers_of, strict=True)):
        letters = group.states(manager._tables_of(index))
        free = [0, *[number for number, letter in enumerate(letters.decode(), 1) if letter == "."]]
        for layer in layers:
            for tensor in pool.tensors_of(layer):
                values = tensor.numpy().reshape(pool.num_blocks[layer], -1).copy()
                values[free] = np.nan
                device.write(tensor, values.reshape(-1))


def test_a_conversation_of_many_windows_holds_one_and_reads_nothing_else(tmp_path: Path) -> None:
    case = read_cases("gemma3")[-1]  # eight windows of 21 tokens
    settings = ENGINE | {"max_num_seqs": 1, "decode_buckets": (1,), "enable_prefix_caching": False}
    llm = LLM(str(write_hf(tmp_path / "tiny", RECIPES["gemma3"]).path), **settings)
    core: Any = llm._loaded.engine.core
    runner: Any = llm._loaded.runner
    (group,) = runner.capacity.other_groups
    manager, held = core.scheduler.block_manager, []
    assert group == BlockGroup(13, 21) and runner.capacity.num_blocks == 31
    layers_of = [list(one.shapes) for one in runner.model.pool_groups]
    advance = core.scheduler.advance

    def watch(plan: Any) -> None:
        """After each launch, which on a CPU has run at once."""
        advance(plan)
        held.append([pool.num_blocks - 1 - pool.num_free for pool in manager.pools])
        runner.wait()
        spoil_free_blocks(manager, runner.pool, layers_of, runner.backend.device)

    core.scheduler.advance = watch
    check(llm.generate(case["prompt"], GREEDY)[0], case)
    everything, windows = zip(*held, strict=True)
    assert max(everything) == everything[-1] > 16, "the conversation"
    assert max(windows) <= 3 + 3 + 1, "a window and a chunk of 24 tokens"
    assert max(windows[len(windows) // 2 :]) <= 4, "a window"
    llm.close()
