"""What adapter_config.json says, and which settings are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_json
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.adapter_config import AdapterConfig, read_adapter_config

PEFT = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"}


def read(directory: Path, **settings: Any) -> AdapterConfig:
    write_json(directory / "adapter_config.json", PEFT | settings)
    return read_adapter_config(directory)


def test_scales_and_ranks_follow_patterns_as_in_peft(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        rank_pattern={"down_proj": 4, "^model.layers.0.mlp.up_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 1},
        base_model_name_or_path="a/b",
    )
    assert (config.rank_of("model.layers.3.mlp.down_proj"), config.rank_of("model.layers.3.mlp.other_down_proj")) == (
        4,
        8,
    )
    assert (config.rank_of("model.layers.0.mlp.up_proj"), config.rank_of("x.model.layers.0.mlp.up_proj")) == (2, 8)
    assert config.scale_of("model.layers.1.self_attn.q_proj") == 1 / 8
    assert config.scale_of("model.layers.3.mlp.down_proj") == 16 / 4
    assert (config.max_rank, config.base_model) == (8, "a/b")
    assert read(tmp_path, use_rslora=True, r=4).scale_of("q_proj") == 16 / 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', which is not supported; known: LORA"),
        ({"use_dora": True}, r"use_dora is True, which is not supported \(DoRA, which also scales the base model's"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not supported \(whole modules"),
        ({"bias": "all"}, "bias is 'all', which is not supported; known: none"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which changes the base model's",
        ),
        ({"rank_pattern": {"(a+)+$": 4}}, r"rank_pattern has the regular expression '\(a\+\)\+\$'"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters is .*such as experts'"),
    ],
)
def test_what_would_change_the_answers_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0: it must be a whole number of at least 1"),
        ({"r": 10**9}, "r is 1000000000: .* at most 512"),
        ({"lora_alpha": None}, "lora_alpha is null: it must be a number above 0"),
        (
            {"peft_type": None, "lora_parameters": {"rank": 8, "scale": None}},
            "scale is null: it must be a number above 0",
        ),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan: it must be a number"),
        ({"rank_pattern": {"q_proj": "8"}}, r"rank_pattern\.q_proj is '8'"),
        ({"peft_type": None}, "has neither peft_type nor lora_parameters"),
    ],
)
def test_damaged_settings_are_errors(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, **settings)


def test_what_is_no_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        read_adapter_config(tmp_path)
    with pytest.raises(ModelError, match="is not a directory"):
        read_adapter_config(tmp_path / "absent")
    write_json(tmp_path / "adapter_config.json", PEFT)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"adapter_model\.bin, a pickle file"):
        read_adapter_config(tmp_path)
