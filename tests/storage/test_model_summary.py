"""What lists of models say, from the headers of tiny files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.builders import GGUFTweaks, write_tiny_gguf, write_tiny_hf_llama
from tinyvllm.config import ModelFiles
from tinyvllm.storage.model_summary import summarize


def test_both_formats_of_a_model_have_the_same_parameters(
    tiny_hf_files: ModelFiles, tiny_gguf_files: ModelFiles
) -> None:
    hf, gguf = summarize(tiny_hf_files), summarize(tiny_gguf_files)
    assert hf.num_parameters == gguf.num_parameters == sum(math.prod(tensor.shape) for tensor in hf.tensors)
    assert (hf.format, gguf.format) == ("safetensors", "gguf")
    assert (hf.quantization, gguf.quantization) == ("F32", "Q4_1")
    shared = {"context_length", "block_count", "embedding_length", "attention.head_count", "attention.head_count_kv"}
    assert {hf.info[f"llama.{key}"] == gguf.info[f"llama.{key}"] for key in shared} == {True}
    assert hf.num_bytes == sum(path.stat().st_size for path in tiny_hf_files.path.iterdir())


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first, moved = write_tiny_gguf(tmp_path / "a" / "m.gguf"), write_tiny_gguf(tmp_path / "b" / "m.gguf")
    other = write_tiny_gguf(tmp_path / "c" / "m.gguf", seed=7)
    os.utime(moved.path, (1, 1))
    assert summarize(first).fingerprint == summarize(moved).fingerprint != summarize(other).fingerprint
    assert summarize(moved).modified_s == 1
    moved.path.write_bytes(other.path.read_bytes())  # noticed by its time
    assert summarize(moved).fingerprint == summarize(other).fingerprint


def test_the_quantization_is_the_stated_file_type(tmp_path: Path) -> None:
    for number, name in ((15, "Q4_K_M"), (1, "F16"), (0, "F32"), (9999, "Q4_1")):
        tweaks = GGUFTweaks(metadata={"general.file_type": number})
        assert summarize(write_tiny_gguf(tmp_path / f"{number}.gguf", tweaks=tweaks)).quantization == name


@pytest.mark.parametrize(
    ("config", "tensors", "quantization"),
    [
        ({"quant_method": "gptq", "bits": 4}, {"qweight": (8, 32), "scales": (2, 32), "qzeros": (2, 4)}, "GPTQ 4-bit"),
        ({"group_size": 64, "bits": 8}, {"weight": (64, 8), "scales": (64, 1), "biases": (64, 1)}, "MLX 8-bit"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
            {"weight_packed": (32, 8), "weight_scale": (32, 2)},
            "COMPRESSED-TENSORS 4-bit",
        ),
    ],
)
def test_packed_weights_are_counted_unpacked(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, tuple[int, ...]], quantization: str
) -> None:
    files = write_tiny_hf_llama(tmp_path / "model")
    unquantized = summarize(files).num_parameters
    packed = {
        f"extra.{name}": np.zeros(shape, np.int32 if n == 0 else np.float32)
        for n, (name, shape) in enumerate(tensors.items())
    }
    save_file(packed, files.path / "model-2.safetensors")
    path = files.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    found = summarize(files)
    bits = int(quantization.split()[1].partition("-")[0])
    assert found.num_parameters - unquantized == math.prod(next(iter(tensors.values()))) * 32 // bits
    assert found.quantization == quantization
