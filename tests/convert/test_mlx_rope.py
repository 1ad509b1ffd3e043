"""The rope of a config.json of transformers 5 under the keys that mlx-lm reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_tiny_hf_llama
from tinyvllm.convert.mlx_rope import with_older_keys
from tinyvllm.convert.quantize import quantize
from tinyvllm.convert.targets import parse_target
from tinyvllm.storage.model_config import read_model_config

PLAIN = {"rope_theta": 500.0, "rope_type": "default"}
LINEAR = {"rope_theta": 500.0, "rope_type": "linear", "factor": 8.0}
LONG = {"rope_theta": 500.0, "rope_type": "longrope", "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("architecture", "rope", "added"),
    [
        ("llama", PLAIN, {"rope_theta": 500.0}),
        ("glm4", PLAIN | {"partial_rotary_factor": 0.5}, {"rope_theta": 500.0, "partial_rotary_factor": 0.5}),
        ("qwen2", LINEAR, {"rope_theta": 500.0, "rope_scaling": LINEAR | {"type": "linear"}}),
        (
            "phi3",
            LONG,
            {
                "rope_theta": 500.0,
                "rope_scaling": LONG | {"type": "longrope"},
                "original_max_position_embeddings": 64,
            },
        ),
        (
            "gemma3",
            {"full_attention": LINEAR, "sliding_attention": PLAIN | {"rope_theta": 7.0}},
            {"rope_theta": 500.0, "rope_scaling": LINEAR | {"type": "linear"}, "rope_local_base_freq": 7.0},
        ),
        (
            "olmo3",
            {"full_attention": LINEAR, "sliding_attention": PLAIN},
            {"rope_theta": 500.0, "rope_scaling": LINEAR | {"type": "linear"}},
        ),
        ("olmo3", {"full_attention": LINEAR, "sliding_attention": PLAIN | {"rope_theta": 7.0}}, {}),
        ("gemma4", {"full_attention": LINEAR, "sliding_attention": PLAIN}, {}),
        ("llama", None, {}),
    ],
)
def test_keys_are_added_beside_rope_parameters(architecture: str, rope: Any, added: dict[str, Any]) -> None:
    config = {"rope_parameters": rope, "hidden_size": 64}
    assert with_older_keys(config, architecture) == config | added
    assert with_older_keys({"text_config": config}, architecture) == {"text_config": config | added}


def test_what_the_file_says_in_the_older_way_decides_as_in_transformers() -> None:
    config = {"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 9.0}
    assert with_older_keys(config, "llama") == config
    assert with_older_keys({"rope_parameters": PLAIN, "rope_theta": 9.0}, "llama")["rope_theta"] == 500.0


def test_an_mlx_directory_has_both_and_other_targets_their_own(tmp_path: Path) -> None:
    source = write_tiny_hf_llama(tmp_path / "hf", hidden=64)
    path = source.path / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_theta", "rope_scaling"):
        config.pop(key, None)
    path.write_text(json.dumps(config | {"rope_parameters": LINEAR}))
    for to, added in (("mlx-4", {"rope_theta": 500.0, "rope_scaling": LINEAR | {"type": "linear"}}), ("fp8", {})):
        written = quantize(source, parse_target(to), tmp_path / to, lambda done, total: None).files
        found = json.loads((written.path / "config.json").read_text())
        assert {key: found.get(key) for key in ("rope_theta", "rope_scaling") if key in found} == added
        assert found["rope_parameters"] == LINEAR
        assert read_model_config(written).rope == read_model_config(source).rope
