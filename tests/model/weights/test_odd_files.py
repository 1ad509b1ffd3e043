"""Files as other tools and careless hands leave them: what loads all the same, as in transformers and llama.cpp, and
what is refused by name. docs/FORMATS.md lists these cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from tests.builders import (
    GGUFTweaks,
    TinyLlama,
    make_weights,
    write_json,
    write_safetensors,
    write_tiny_gguf,
    write_tiny_hf_llama,
)
from tests.fuzz.gguf_image import parse
from tests.model.weights.test_checkpoint import assert_same, open_files, take_all
from tinyvllm.arrays import to_float32
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, UnsupportedModelError, WeightMismatchError
from tinyvllm.model.dry_load import require_tensors
from tinyvllm.model.registry import complete_config
from tinyvllm.storage.model_config import read_model_config
from tinyvllm.storage.resolve import resolve_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


def write_named(directory: Path, name_of: Callable[[str], str], **numbers: Any) -> ModelFiles:
    """A directory whose tensors have other names."""
    files = write_tiny_hf_llama(directory, **numbers)
    named = {name_of(name): weight for name, weight in make_weights(TinyLlama(**numbers)).items()}
    write_safetensors(directory / "model.safetensors", named)
    return files


def edit_json(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)


# --- names of tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name_of",
    [
        lambda name: name.removeprefix("model."),  # a base model saved alone
        lambda name: "_orig_mod." + name,  # torch.compile
        lambda name: name.replace("self_attn.", "_orig_mod.self_attn."),  # of one module
        lambda name: "module." + name,  # data parallelism
        lambda name: "module._orig_mod." + name,
    ],
)
def test_names_of_wrappers_and_of_base_models_become_the_models_own(
    tmp_path: Path, name_of: Callable[[str], str]
) -> None:
    assert_same(take_all(write_named(tmp_path / "m", name_of)), make_weights(TinyLlama()))


def test_a_base_models_head_keeps_its_name(tmp_path: Path) -> None:
    files = write_named(tmp_path / "m", lambda name: name.removeprefix("model."), tie=False)
    assert_same(take_all(files, tie=False), make_weights(TinyLlama(tie=False)))


def test_a_tied_models_head_of_other_values_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers 5 believes the files, not config.json; a head of the same values is left out."""
    files = write_tiny_hf_llama(tmp_path / "m", tie=False)
    edit_json(files.path / "config.json", tie_word_embeddings=True)
    checkpoint = open_files(files)
    weights = make_weights(TinyLlama(tie=False))
    assert checkpoint.has_head and "a head of other values, which is used" in caplog.text
    np.testing.assert_array_equal(checkpoint.take(HEAD, (260, 64)), weights[HEAD])
    write_safetensors(files.path / "model.safetensors", weights | {HEAD: weights[EMBEDDING]})
    assert not open_files(files).has_head


def test_a_tied_model_may_have_its_matrix_as_the_head_alone(tmp_path: Path) -> None:
    files = write_named(tmp_path / "m", lambda name: HEAD if name == EMBEDDING else name)
    assert_same(take_all(files), make_weights(TinyLlama()))


# --- files of a directory ----------------------------------------------------------------------------------------


def test_tensors_that_only_the_index_lists_are_not_missed_until_they_are_needed(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m", shards=2)
    weight_map = json.loads((files.path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    edit_json(files.path / INDEX, weight_map=weight_map | {HEAD: "model-00001-of-00002.safetensors"})
    assert_same(take_all(files), make_weights(TinyLlama()))


def test_an_index_may_lead_to_folders_and_to_links_of_the_hubs_cache(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "models--org--m" / "snapshots" / "0123abc", shards=2)
    blobs = tmp_path / "models--org--m" / "blobs"
    blobs.mkdir()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (files.path / "parts").mkdir()
    (files.path / names[0]).rename(files.path / "parts" / names[0])
    (files.path / names[1]).rename(blobs / "4567def")
    (files.path / names[1]).symlink_to("../../blobs/4567def")
    weight_map = json.loads((files.path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    moved = {name: "parts/" + place if place == names[0] else place for name, place in weight_map.items()}
    edit_json(files.path / INDEX, weight_map=moved)
    assert_same(take_all(files), make_weights(TinyLlama()))


def test_of_a_tensor_in_two_files_the_index_chooses_one(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m", shards=2)
    weights = make_weights(TinyLlama())
    weight_map = json.loads((files.path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        part = {key: weight if weight_map[key] == name else weight + 1 for key, weight in weights.items()}
        write_safetensors(files.path / name, part)
    assert_same(take_all(files), weights)


def test_a_single_file_is_preferred_to_an_index_of_absent_ones(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m")
    write_json(files.path / INDEX, {"weight_map": {HEAD: "model-00001-of-00002.safetensors"}})
    assert_same(take_all(files), make_weights(TinyLlama()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.safetensors", "in Mistral's own format: download model"),
        ("adapter_model.safetensors", "an adapter without its base model: serve that"),
    ],
)
def test_files_in_other_formats_are_left_alone_and_named_if_alone(tmp_path: Path, name: str, message: str) -> None:
    files = write_tiny_hf_llama(tmp_path / "m", shards=2)
    (files.path / INDEX).unlink()
    write_safetensors(files.path / name, {"layers.0.attention.wq.weight": np.ones((2, 2), np.float32)})
    assert_same(take_all(files), make_weights(TinyLlama()))
    for path in files.path.glob("model-*"):
        path.unlink()
    with pytest.raises(UnsupportedModelError, match=f"has only {name}, {message}"):
        open_files(files)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtypes_may_be_spelled_as_torch_prints_them(tmp_path: Path, key: str) -> None:
    files = write_tiny_hf_llama(tmp_path / "m")
    edit_json(files.path / "config.json", **{key: "torch.bfloat16"})
    assert read_model_config(files).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_without_a_dtype_the_files_own_is_taken(tmp_path: Path, dtype: str) -> None:
    files = write_tiny_hf_llama(tmp_path / "m", dtype=dtype)
    edit_json(files.path / "config.json", torch_dtype=None)
    assert read_model_config(files).dtype == dtype
    (files.path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert read_model_config(files).dtype == "float32"  # what is wrong with the file, its reader says


def test_norms_may_have_another_type_than_matrices(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m")
    weights = make_weights(TinyLlama())
    for number, is_norm in enumerate((True, False)):
        part = {name: weight for name, weight in weights.items() if name.endswith("norm.weight") == is_norm}
        write_safetensors(files.path / f"model-{number}.safetensors", part, "float32" if is_norm else "bfloat16")
    (files.path / "model.safetensors").unlink()
    taken = take_all(files)
    for name, weight in weights.items():
        stored = weight if name.endswith("norm.weight") else weight.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(taken[name], stored)


# --- GGUF --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_norms_of_a_gguf_file_may_be_halves(tmp_path: Path, dtype: Any) -> None:
    name = "blk.1.attn_norm.weight"
    norm = np.linspace(0.5, 2, 64).astype(dtype)
    tweaks = GGUFTweaks(drop=(name,), extra={name: norm})
    checkpoint = open_files(write_tiny_gguf(tmp_path / "m.gguf", tweaks=tweaks))
    taken = to_float32(checkpoint.take("model.layers.1.input_layernorm.weight", (64,)))
    np.testing.assert_array_equal(taken, norm.astype(np.float32))


def test_norms_of_a_gguf_file_may_be_quantized(tmp_path: Path) -> None:
    norm = np.linspace(0.5, 2, 64, dtype=np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(norm[None], kind)
    image = parse(write_tiny_gguf(tmp_path / "m.gguf").path.read_bytes())
    place = next(place for place, one in enumerate(image.tensors) if one.name == b"blk.1.attn_norm.weight")
    info = image.tensors[place]
    image.tensors[place] = replace(info, kind=int(kind))
    data = image.data[: info.offset] + blocks.tobytes() + image.data[info.offset + blocks.size :]
    (tmp_path / "q.gguf").write_bytes(replace(image, data=data).to_bytes())
    checkpoint = open_files(ModelFiles("gguf", tmp_path / "q.gguf", "q"))
    taken = to_float32(checkpoint.take("model.layers.1.input_layernorm.weight", (64,)))
    np.testing.assert_array_equal(taken, gguf.quants.dequantize(blocks, kind)[0])


def test_a_surplus_bias_of_no_whole_number_of_heads_is_named(tmp_path: Path) -> None:
    files = write_tiny_gguf(tmp_path / "m.gguf", tweaks=GGUFTweaks(extra={"blk.0.attn_k.bias": np.ones(3)}))
    with pytest.raises(WeightMismatchError, match=r"does not use: model\.layers\.0\.self_attn\.k_proj\.bias"):
        require_tensors(complete_config(read_model_config(files)), open_files(files))


def test_counts_of_heads_may_be_lists_of_equal_numbers(tmp_path: Path) -> None:
    """llama.cpp's converter writes lists for families whose layers differ, and fine-tunes of theirs may not."""
    keys = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.feed_forward_length": 96}
    path = write_tiny_gguf(tmp_path / "m.gguf").path
    lists = write_tiny_gguf(tmp_path / "l.gguf", tweaks=GGUFTweaks(metadata={k: [n, n] for k, n in keys.items()})).path
    config = read_model_config(ModelFiles("gguf", lists, "m"))
    assert config == read_model_config(ModelFiles("gguf", path, "m"))


def test_a_directory_of_one_gguf_model_is_that_model(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "d" / "Tiny.Q4_1.GGUF").path
    (path.parent / "mmproj-tiny-f16.gguf").write_bytes(b"GGUF")
    files = resolve_model(str(path.parent))
    assert (files.kind, files.path) == ("gguf", path)
    assert_same(take_all(files), take_all(replace(files, path=path)))
    write_tiny_gguf(path.with_name("tiny.Q8_0.gguf"))
    with pytest.raises(ModelError, match=r"has several \.gguf files: give one of them \(Tiny\.Q4_1\.GGUF, tiny\.Q8_0"):
        resolve_model(str(path.parent))
