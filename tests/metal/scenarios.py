"""What the engine is asked on METAL. `python -m tests.metal.scenarios PATH NAME` makes a scenario's model there, and
prints the answer on the command's device as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.builders import GGUFTweaks, write_tiny_gguf, write_tiny_hf_llama
from tests.families.mtp import write_hf_with_mtp
from tests.families.recipe import sizes, write_hf
from tests.families.recipes import RECIPES
from tinyvllm import LLM, SamplingParams
from tinyvllm.config import ModelFiles

# shapes that the fused kernels serve, wide enough for the K kinds' blocks and not, and one that they do not serve
FUSED = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 512}
NARROW = {"hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 64, "ffn": 96}
GENERAL = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96}
QWEN3 = {"family": "qwen3", "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 96, "norm_eps": 1e-6}
# llama.cpp's Q4_K_M, and each kind that matters where one of its mixtures may have it
MEDIUM = {"attn_v": "Q6_K", "ffn_down": "Q6_K"}
MIXED = {"attn_v": "Q6_K", "attn_output": "Q4_1", "ffn_down": "Q6_K", "ffn_gate": "Q4_0", "ffn_up": "Q4_0"}

# Rows of every kind at once: a decode bucket of 4 (also with rows of padding), prompts cut into chunks next to others'
# decodes, a pool of 5 blocks and the dummy for five sequences that would take 13, prompts that begin alike.
CROWDED: dict[str, Any] = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "num_gpu_blocks_override": 6,
    "decode_buckets": (4,),
    "token_buckets": (16,),
    "compile_cache": False,
}
EXACT = {"dtype": "float32", "kv_cache_dtype": "float32"}
BRIEF: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16}
ALONE: dict[str, Any] = BRIEF | {"max_num_seqs": 1, "decode_buckets": (1,), "token_buckets": (16,)}

LONG = "the quick brown fox jumps over"
PROMPTS = (LONG, "a", LONG[:20] + " cat", "0123456789abcdefghi", "the quick brown dog")


@dataclass(frozen=True)
class Scenario:
    """A model, an engine, and prompts. Greedy unless `sampling` says otherwise."""

    write: Callable[[Path], ModelFiles]
    engine: Mapping[str, Any]
    prompts: tuple[str, ...] = PROMPTS
    max_tokens: int = 16
    sampling: tuple[Mapping[str, Any], ...] = ()
    tie: float = 1e-3  # a greedy token may have a logprob so far below the likeliest one's


def _dense(dtype: str, shape: Mapping[str, Any]) -> Callable[[Path], ModelFiles]:
    return lambda path: write_tiny_hf_llama(path, dtype=dtype, **shape)


def _family(name: str, **changes: Any) -> Callable[[Path], ModelFiles]:
    """A recipe of the family with heads that the fused kernels serve, and windows shorter than the prompts."""
    config = {**RECIPES[name].config, **sizes(2, 64, 4, 2, 64, 96), **changes}
    return lambda path: write_hf(path, replace(RECIPES[name], config=config), dtype="float16")


def _drafting(path: Path) -> ModelFiles:
    """Qwen3.5 of one layer of attention and two recurrent ones, with the layer that drafts."""
    own = RECIPES["qwen3_5"]
    config = {**own.config, **sizes(3, 64, 4, 2, 64, 96), "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    return write_hf_with_mtp(path, replace(own, config=config), "float16")


def _quantized(kind: str, quant_of: Mapping[str, str] = {}) -> Callable[[Path], ModelFiles]:
    tweaks = GGUFTweaks(quant_of=quant_of)
    return lambda path: write_tiny_gguf(path.with_suffix(".gguf"), quant=kind, tweaks=tweaks, **FUSED)


SAMPLING: tuple[Mapping[str, Any], ...] = (
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_k": 20},
    {"temperature": 1.3, "seed": 3, "top_p": 0.8},
    {"temperature": 1.0, "seed": 4, "min_p": 0.1, "logprobs": 3},
    {"temperature": 0.0, "logprobs": 5},
)

SCENARIOS: dict[str, Scenario] = {
    "float32": Scenario(_dense("float32", GENERAL), CROWDED | EXACT),
    "float16": Scenario(_dense("float16", NARROW | {"layers": 1}), CROWDED, tie=0.03),  # the one of the default run
    "bfloat16": Scenario(_dense("bfloat16", FUSED), CROWDED, tie=0.03),
    "qwen3": Scenario(_dense("float16", QWEN3), BRIEF | {"decode_buckets": (2,)}, PROMPTS[:2], max_tokens=8, tie=0.03),
    "qwen2": Scenario(_family("qwen2"), BRIEF | {"decode_buckets": (2,)}, PROMPTS[:2], max_tokens=8, tie=0.03),
    "mistral": Scenario(
        _family("mistral", sliding_window=9),
        BRIEF | {"decode_buckets": (2,)},
        PROMPTS[:2],
        max_tokens=8,
        tie=0.03,
    ),
    "gemma3": Scenario(
        _family("gemma3", sliding_window=9, sliding_window_pattern=2, query_pre_attn_scalar=48),
        BRIEF | {"decode_buckets": (2,)},
        PROMPTS[:2],
        max_tokens=8,
        tie=0.03,
    ),
    # two recurrent layers, whose states are resumed, and one of attention with an output gate
    "qwen3_5": Scenario(
        _family("qwen3_5", num_hidden_layers=3, linear_key_head_dim=64, linear_value_head_dim=64),
        BRIEF | {"decode_buckets": (2,)},
        PROMPTS[:2],
        max_tokens=8,
        tie=0.03,
    ),
    # the same with drafts by its own layer
    "mtp": Scenario(
        _drafting,
        BRIEF
        | {"decode_buckets": (2,), "token_buckets": (16,), "verify_buckets": (6,)}
        | {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2, "adaptive": False}},
        PROMPTS[:2],
        max_tokens=8,
        tie=0.03,
    ),
    # one row at a time: tests/metal/test_kernels.py has products of several
    "medium": Scenario(_quantized("Q4_K", MEDIUM), CROWDED, tie=0.03),
    "mixed": Scenario(_quantized("Q4_K", MIXED), ALONE, PROMPTS[:3], max_tokens=8, tie=0.03),
    "sampled": Scenario(_dense("float32", GENERAL), CROWDED | EXACT, sampling=SAMPLING),
    # steps that verify drafts, right and wrong, between steps that overlap
    "drafts": Scenario(
        _dense("float16", FUSED),
        BRIEF
        | {
            "decode_buckets": (2,),
            "verify_buckets": (8,),
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "adaptive": False},
        },
        ("ababab abab", "0123 0123 01"),
        max_tokens=12,
        tie=0.03,
    ),
}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
SCENARIOS |= {kind: Scenario(_quantized(kind), BRIEF, PROMPTS[:3], max_tokens=8, tie=0.03) for kind in QUANTIZED}


@dataclass
class Answer:
    """What an engine gave for each prompt, and for the first one again."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[dict[int, float]] | None]
    cached_tokens: int
    num_preemptions: int
    num_captures: int
    num_accepted: int  # drafts


def answer(scenario: Scenario, files: ModelFiles) -> Answer:
    """Run a scenario on this process's device."""
    llm = LLM(str(files.path), **scenario.engine)
    captures = llm.stats.num_captures
    params = [
        SamplingParams(max_tokens=scenario.max_tokens, ignore_eos=True, **{"temperature": 0.0, **given})
        for given in scenario.sampling or ({},) * len(scenario.prompts)
    ]
    outputs = llm.generate(list(scenario.prompts), params)
    again = llm.generate([scenario.prompts[0]], [params[0]])  # its prompt is in the cache, at least for some blocks
    assert llm.stats.num_captures == captures, "a graph was captured while serving"
    found = Answer(
        prompts=[list(output.prompt_token_ids) for output in [*outputs, *again]],
        tokens=[list(output.outputs[0].token_ids) for output in [*outputs, *again]],
        logprobs=[_plain(output.outputs[0].logprobs) for output in [*outputs, *again]],
        cached_tokens=again[0].num_cached_tokens,
        num_preemptions=llm.stats.num_preemptions,
        num_captures=captures,
        num_accepted=llm.stats.num_accepted_tokens,
    )
    llm.close()
    return found


def _plain(logprobs: Any) -> list[dict[int, float]] | None:
    if logprobs is None:
        return None
    return [{token: entry.logprob for token, entry in found.items()} for found in logprobs]


if __name__ == "__main__":
    scenario = SCENARIOS[sys.argv[2]]
    print(json.dumps(vars(answer(scenario, scenario.write(Path(sys.argv[1]))))))
