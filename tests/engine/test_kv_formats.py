"""The engine with a quantized KV cache: chunks, the prefix cache, and what it says about its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.builders import write_tiny_hf_llama
from tinyvllm import LLM, SamplingParams
from tinyvllm.cli.commands import app
from tinyvllm.config import EngineConfig
from tinyvllm.errors import TinyvllmError

NUM_BLOCKS = 24
SETTINGS: dict[str, Any] = {  # those of tests/execution/test_tiers_on_device.py, whose programs serve here, too
    "dtype": "float32",
    "max_model_len": 160,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": NUM_BLOCKS,
    "block_size": 8,
    "decode_buckets": (2,),
    "token_buckets": (32,),
}
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, logprobs=1, ignore_eos=True)


def test_a_prefix_found_in_a_quantized_cache_gives_the_same_numbers(tmp_path: Path) -> None:
    """The tokens before are read from the pool however they came there, so that chunks and prefixes change no bit."""
    files = write_tiny_hf_llama(tmp_path / "tiny", hidden=64, heads=4, kv_heads=2, head_dim=32)
    llm = LLM(str(files.path), kv_cache_dtype="q8_0", kv_cache_dtype_v="q4_0", **SETTINGS)
    loaded: Any = llm._loaded
    prompt = {"prompt_token_ids": [(7 * i) % 200 for i in range(70)]}  # in three chunks
    (first,), (again,) = llm.generate([prompt], PARAMS), llm.generate([prompt], PARAMS)
    assert again.num_cached_tokens == 64 and first.outputs[0].logprobs == again.outputs[0].logprobs
    capacity = loaded.runner.capacity
    assert capacity.kv_cache_dtype == "q8_0 keys, q4_0 values"
    pool_bytes = sum(tensor.nbytes() for tensor in loaded.runner.pool.tensors)
    assert (
        sum(capacity.memory.kv_groups) == pool_bytes == NUM_BLOCKS * 8 * 2 * 2 * (32 + 2 + 16 + 2)
    )  # blocks, tokens, layers
    assert any("KV cache in q8_0 keys, q4_0 values: 0.2 KiB a token" in line for line in capacity.explanation)
    llm.close()


def test_the_change_of_a_format_is_measured(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "tiny", hidden=64, heads=4, kv_heads=2, head_dim=32, max_position=256)
    flags = ["--formats", "fp8", "--tokens", "200", "--window", "110", "--json", "-", "--device", "CPU"]
    done = CliRunner().invoke(app, ["bench", "kv-quality", str(files.path), *flags])
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])
    assert row["kv_cache_dtype"] == "fp8_e4m3" and row["bytes_per_element"] == 1 and row["tokens"] == 198
    assert row["top1_agreement"] > 0.7 and 0 < row["mean_abs_logprob_change"] < 0.2


def test_unknown_formats_are_refused_by_name() -> None:
    with pytest.raises(TinyvllmError, match=r"--kv-cache-dtype-v is 'q5_0': choose one of auto, .*, q4_0, fp8"):
        EngineConfig("tiny", kv_cache_dtype_v="q5_0")
    assert EngineConfig("tiny", kv_cache_dtype="fp8", kv_cache_dtype_v="f16").kv_types == ("fp8_e4m3", "float16")
    done = CliRunner().invoke(app, ["bench", "kv-quality", "--formats", "q8_0/q9", "--device", "CPU"])
    assert "--formats has 'q8_0/q9'" in done.stderr
