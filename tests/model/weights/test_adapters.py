"""Reading an adapter's tensors: what does not fit the model, or is damaged, is an error that names the tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.adapters import ALL_MODULES, adapter_weights, module_path, module_sizes, write_adapter, write_mlx_adapter
from tests.builders import TinyLlama, write_tiny_hf_llama
from tinyvllm.config import ModelConfig
from tinyvllm.errors import ModelError
from tinyvllm.model.weights.adapters import AdapterWeights, Module, read_adapter
from tinyvllm.storage.model_config import read_model_config

TINY = TinyLlama()
MODULES = {
    path: Module(path, *module_sizes(TINY)[module])
    for layer in range(TINY.layers)
    for module in ALL_MODULES
    for path in [module_path(layer, module)]
}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_model_config(write_tiny_hf_llama(tmp_path_factory.mktemp("model")))


def read(directory: Path, config: ModelConfig, max_rank: int = 16) -> AdapterWeights:
    return read_adapter(directory, MODULES, config, max_rank)


def test_matrices_are_read_and_scaled(tmp_path: Path, config: ModelConfig) -> None:
    write_adapter(tmp_path / "peft", TINY, rank=4, seed=1, lora_alpha=2, ranks={"k_proj": 6})
    write_mlx_adapter(tmp_path / "mlx", TINY, ("q_proj",), 4, 20.0, seed=1)
    found, mlx = read(tmp_path / "peft", config), read(tmp_path / "mlx", config)
    assert found.rank == 6 and found.modules.keys() == MODULES.keys() and found.digest != mlx.digest
    expected = adapter_weights(TINY, ALL_MODULES, 4, 1, {"k_proj": 6})
    for path, (a, b) in expected.items():
        assert (found.modules[path].a == a).all()
        assert found.modules[path].b == pytest.approx(b * (2 / len(a)))
    for path, (a, b) in adapter_weights(TINY, ("q_proj",), 4, 1, {}).items():
        assert (mlx.modules[path].a == a).all() and mlx.modules[path].b == pytest.approx(b * 20)


def test_fused_modules_are_divided(tmp_path: Path, config: ModelConfig) -> None:
    rng = np.random.default_rng(0)
    rows = sum(module_sizes(TINY)[name][0] for name in ("q_proj", "k_proj", "v_proj"))
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, TINY.hidden), (rows, 4)))
    write_adapter(tmp_path, TINY, ("q_proj",), 4)
    name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_"
    save_file({f"{name}A.weight": a, f"{name}B.weight": b}, tmp_path / "adapter_model.safetensors")
    found = read(tmp_path, replace(config, architecture="phi3")).modules
    parts = [found[module_path(1, name)] for name in ("q_proj", "k_proj", "v_proj")]
    assert all((part.a == a).all() for part in parts) and (np.concatenate([part.b for part in parts]) == b).all()


def change(tensors: dict[str, Any], case: str) -> dict[str, Any]:
    """The tensors of an adapter with one fault."""
    a, b = tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"]
    cases: dict[str, dict[str, Any]] = {
        "no other half": {f"{Q}.lora_B.weight": None},
        "other model": {f"{Q}.lora_B.weight": np.ascontiguousarray(b[:-1])},
        "vector": {f"{Q}.lora_A.weight": a[0]},
        "nan": {f"{Q}.lora_A.weight": np.where(a == a[0, 0], np.nan, a).astype(np.float32)},
        "huge": {f"{Q}.lora_B.weight": b * np.float32(1e6)},
        "huge A": {f"{Q}.lora_A.weight": a * np.float32(1e6)},
        "integers": {f"{Q}.lora_A.weight": a.astype(np.int32)},
        "layer": {f"{Q.replace('layers.0', 'layers.7')}.lora_A.weight": a},
        "dora": {f"{Q}.lora_magnitude_vector.weight": a[0]},
        "embeddings": {"base_model.model.model.embed_tokens.lora_embedding_A": a},
        "head": {"base_model.model.lm_head.weight": a},
        "module": {f"{Q.replace('q_proj', 'g_proj')}.lora_A.weight": a},
        "twice": {f"{Q.removeprefix('base_model.model.')}.lora_A.weight": a},
        "nothing": dict.fromkeys(tensors),
    }
    return {name: tensor for name, tensor in (tensors | cases[case]).items() if tensor is not None}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no other half", r"q_proj\.lora_A\.weight has no lora_B beside it"),
        ("other model", r"q_proj\.lora_B\.weight has shape \(63, 8\), but for rank 8 .* 64 x 64 .* must be \(64, 8\)"),
        ("vector", r"q_proj\.lora_A\.weight has shape \(64,\), but must be a matrix"),
        ("nan", r"q_proj\.lora_A\.weight has values that are not finite"),
        ("huge", r"q_proj\.lora_B\.weight, scaled, has values beyond 65504"),
        ("huge A", r"q_proj\.lora_A\.weight has values beyond 65504"),
        ("integers", r"q_proj\.lora_A\.weight has type I32, which is not supported; known: F32, F16, BF16"),
        ("layer", r"layers\.7\.self_attn\.q_proj\.lora_A\.weight': the model has only 2 layers"),
        ("dora", "lora_magnitude_vector.weight' is of DoRA"),
        ("embeddings", "lora_embedding_A' is of the embeddings"),
        ("head", r"lm_head\.weight' is of no low-rank matrix of a layer"),
        (
            "module",
            r"g_proj\.lora_A\.weight' changes .*g_proj', where this model takes no adapters; supported are q_proj",
        ),
        ("twice", "are of the same module"),
        ("nothing", "it has no tensors of LoRA"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(
    tmp_path: Path, config: ModelConfig, case: str, message: str
) -> None:
    path = write_adapter(tmp_path, TINY, ("q_proj",)) / "adapter_model.safetensors"
    save_file(change(load_file(path), case), path)
    with pytest.raises(ModelError, match=message):
        read(tmp_path, config)


def test_a_rank_above_the_limit_and_a_damaged_file_are_errors(tmp_path: Path, config: ModelConfig) -> None:
    path = write_adapter(tmp_path, TINY, ("q_proj",)) / "adapter_model.safetensors"
    with pytest.raises(ModelError, match=r"lora_A\.weight has rank 8, but --max-lora-rank is 4: raise it"):
        read(tmp_path, config, max_rank=4)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="cut short or damaged"):
        read(tmp_path, config)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="outside the model's directory"):
        read(tmp_path, config)
