"""Conversations with a tiny Qwen3.5, most of whose layers are recurrent: what each turn computes, by count, and that
the answers are those of an engine that caches nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.families.recipe import write_hf
from tests.families.recipes import RECIPES
from tinyvllm import LLM, EngineConfig, SamplingParams
from tinyvllm.bench.cold_start import plans_for
from tinyvllm.engine.loading import assemble_engine
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.scheduling.plan import StepPlan

BLOCK = 8
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,  # prompts in chunks, in steps with others' decodes
    "async_scheduling": True,
    "num_gpu_blocks_override": 66,  # one sequence of full length, so four preempt each other
    "block_size": BLOCK,
    "decode_buckets": (4,),
    "token_buckets": (8,),
}


class Talks:
    """An engine that counts the tokens of prompts that its steps compute, and remembers what it answered."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.answers: list[tuple[list[int], SamplingParams, list[list[int]]]] = []
        self.num_computed = 0
        runner: Any = llm._loaded.runner
        launch = runner.launch

        def count_and_launch(plan: StepPlan) -> Any:
            for entry in plan.entries:
                stop = min(entry.start + entry.count, entry.request.num_prompt_tokens)
                self.num_computed += max(0, stop - entry.start)
            return launch(plan)

        runner.launch = count_and_launch

    def ask(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[list[int]]]:
        """The tokens of each prompt's choices. `num_computed`: what the steps computed of all prompts."""
        self.num_computed = 0
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        choices = [[list(choice.token_ids) for choice in output.outputs] for output in outputs]
        self.answers += zip(prompts, params, choices, strict=True)
        return choices


def some(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(256) for _ in range(rng.randrange(1, most))]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


# by default, what each turn computes is counted on fakes in tests/scheduling/test_states.py, and recurrent states that
# are kept and set back give the same tokens in test_drafts.py
@pytest.mark.sweep
def test_a_turn_computes_one_block_and_what_is_new_and_answers_as_without_a_cache(tmp_path: Path) -> None:
    llm = LLM(str(write_hf(tmp_path / "tiny", RECIPES["qwen3_5"]).path), **ENGINE)
    rng, talks = random.Random(3), Talks(llm)
    text: list[int] = []
    for _ in range(10):  # ten turns
        new = some(rng, 20)
        ((output,),) = talks.ask([[*text, *new]], [greedy(rng.randrange(1, 20))])
        assert talks.num_computed <= BLOCK + len(new)
        text += [*new, *output]
    assert len(text) > 150
    new = some(rng, 20)
    sampled = SamplingParams(temperature=1.0, seed=7, max_tokens=11, n=3, ignore_eos=True)
    (choices,) = talks.ask([[*text, *new]], [sampled])  # three choices, of which the last two are continued
    assert talks.num_computed <= 3 * (BLOCK + len(new)) and len({tuple(choice) for choice in choices}) == 3
    texts = [[*text, *new, *choice] for choice in choices[1:]]
    talks.ask([[*texts[0], 1], [*texts[1], 2]], [greedy(4), greedy(4)])
    assert talks.num_computed <= 2 * (BLOCK + 1)
    before = llm.stats.num_preemptions
    texts = [some(rng, 20) for _ in range(5)]
    for _ in range(3):  # more conversations at once than the pool holds
        found = talks.ask(texts, [greedy(60)] * 5)
        texts = [[*text, *choices[0], *some(rng, 9)] for text, choices in zip(texts, found, strict=True)]
    assert llm.stats.num_preemptions > before and llm.stats.num_checkpoint_evictions > 0
    turn_caching_off(llm)
    prompts, params, answers = zip(*talks.answers, strict=True)
    assert talks.ask(list(prompts), list(params)) == list(answers)
    assert talks.num_computed >= sum(len(prompt) * one.n for prompt, one in zip(prompts, params, strict=True))
    check_bytes(llm._loaded.runner)
    llm.close()


def check_bytes(runner: Any) -> None:
    """A step of four decodes reads and writes four states, and touches no other slot."""
    (plan,) = plans_for(runner.buckets[0], runner.capacity, context=20)
    cost = RunnerInspector(runner).cost(plan)
    assert cost.state_bytes == 2 * 4 * runner.model_config.state_bytes
    assert cost.nbytes < cost.moved_bytes < 1.3 * cost.nbytes


def turn_caching_off(llm: LLM) -> None:
    """A new scheduler around the same runner."""
    loaded, config = llm._loaded, EngineConfig("tiny", **ENGINE, enable_prefix_caching=False)
    plain = assemble_engine(config, loaded.runner, loaded.tokenizer, None, loaded.generation_defaults)
    llm._loaded = replace(loaded, engine=plain.engine)
