"""Tiny Qwen3 models that embed and rerank, as their repositories hold them. No oracle, no tinyvllm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tests.builders import ENDOFTEXT_ID, make_byte_tokenizer, write_json, write_safetensors
from tests.families.recipe import NUM_TOKENS, Recipe, head_norms, make_weights, sizes
from tinyvllm.config import ModelFiles

RECIPE = Recipe(
    "Qwen3ForCausalLM",
    None,
    sizes(2, 64, 4, 2, 16, 96) | {"model_type": "qwen3", "rope_theta": 1e6, "max_position_embeddings": 1024},
    seed=8,
    more_shapes=head_norms,
)
ANSWERS = {"yes": 260, "no": 261}  # in place of reserved tokens
TEXTS = ("What is the capital of China?", "Beijing.", "Gravity attracts bodies towards each other, and so on.")
QUERY, DOCUMENTS = TEXTS[0], ("The capital of China is Beijing.", "Gravity is a force.", "")


def write_embedder(directory: Path) -> ModelFiles:
    """As Qwen3-Embedding-8B: an untied model without its head, whose tokenizer appends <|endoftext|>."""
    weights = {name.removeprefix("model."): weight for name, weight in make_weights(RECIPE).items()}
    weights.pop("lm_head.weight")
    files = _write(directory, "Qwen3ForCausalLM", weights, {})
    kinds = {"": "models.Transformer", "1_Pooling": "models.Pooling", "2_Normalize": "models.Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in kinds.items()]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    write_json(
        directory / "1_Pooling/config.json",
        {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True},
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", ENDOFTEXT_ID)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return files


def write_reranker(directory: Path) -> ModelFiles:
    return _write(directory, "Qwen3ForCausalLM", make_weights(RECIPE), {})


def write_classifier(directory: Path) -> ModelFiles:
    """A reranker that was converted: its head has one row."""
    weights = make_weights(RECIPE)
    head = weights.pop("lm_head.weight")
    weights["score.weight"] = 0.1 * (head[ANSWERS["yes"]] - head[ANSWERS["no"]])[None]
    return _write(directory, "Qwen3ForSequenceClassification", weights, {"id2label": {"0": "LABEL_0"}})


def _write(directory: Path, hf_class: str, weights: Mapping[str, np.ndarray], more: Mapping[str, Any]) -> ModelFiles:
    directory.mkdir(parents=True)
    config = dict(RECIPE.config) | {"architectures": [hf_class], "dtype": "float32"} | dict(more)
    write_json(directory / "config.json", config)
    write_safetensors(directory / "model.safetensors", weights)
    text = make_byte_tokenizer(NUM_TOKENS).to_str()
    for number, answer in enumerate(ANSWERS):
        text = text.replace(f"<|reserved_{number}|>", answer)
    tokenizers.Tokenizer.from_str(text).save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    return ModelFiles("hf", directory, directory.name)
