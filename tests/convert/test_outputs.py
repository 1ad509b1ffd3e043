"""Whole conversions of tiny models: the files are those that the format's own tools write, and no other is left."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import load_file

from tests.builders import write_tiny_gguf, write_tiny_hf_llama
from tests.families.recipe import write_gguf, write_hf
from tests.families.recipes import RECIPES
from tests.families.recipes.gemma3 import write_multimodal_hf
from tests.sweeps import swept
from tinyvllm.config import ModelFiles
from tinyvllm.convert import hf_output, safetensors_header, stream
from tinyvllm.convert.gguf_metadata import ARCHITECTURES
from tinyvllm.convert.gguf_output import gguf_name
from tinyvllm.convert.hf_files import FAMILIES
from tinyvllm.convert.quantize import Outcome, quantize
from tinyvllm.convert.targets import KNOWN, parse_target
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.model.weights.checkpoint import open_checkpoint
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.model_config import read_model_config
from tinyvllm.text.tokenizer import load_tokenizer

ARCHITECTURE_OF = {name: recipe.config["model_type"].removesuffix("_text") for name, recipe in RECIPES.items()}
# GGUF has no place for what these have: Qwen's windows, and other layers with a window than llama.cpp assumes
UNSAYABLE = ("qwen2_windowed", "gemma3_capped")
WRITABLE = [name for name, kind in ARCHITECTURE_OF.items() if kind in ARCHITECTURES and name not in UNSAYABLE]
DIRECTORIES = [name for name in WRITABLE if ARCHITECTURE_OF[name] in (*FAMILIES, "mistral")]
# llama.cpp does not load a SmolLM3 with them
WITHOUT_BIASES = dataclasses.replace(
    RECIPES["smollm3"],
    biases=(),
    config=dict(RECIPES["smollm3"].config) | {"attention_bias": False, "mlp_bias": False},
)
TEXT = "Hello, wörld 123\n<|im_end|> x"


def convert(source: ModelFiles, to: str, path: Path, **options: Any) -> Outcome:
    return quantize(source, parse_target(to), path, lambda done, total: None, num_threads=2, **options)


def metadata_that_counts(files: ModelFiles) -> dict[str, Any]:
    """Without what a writer may choose."""
    chosen = ("general.", "split.", "tokenizer.ggml.add_space_prefix")  # the last means nothing in byte-level BPE
    return {key: value for key, value in GGUFFile(files.path).metadata.items() if not key.startswith(chosen)}


def test_a_rope_of_larger_heads_than_those_with_a_window_stays_as_it_is(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", RECIPES["gemma4_e2b"])
    found = convert(source, "f16", tmp_path / "found.gguf").files
    assert read_model_config(found).rope == read_model_config(source).rope


# by default: those that no directory is made of
@pytest.mark.parametrize("name", swept(WRITABLE, ["qwen2", *[name for name in WRITABLE if name not in DIRECTORIES]]))
def test_a_gguf_has_llama_cpps_names_rows_and_settings(tmp_path: Path, name: str) -> None:
    """Compared with the file that the gguf package writes of the same weights."""
    recipe = WITHOUT_BIASES if name == "smollm3" else RECIPES[name]
    expected = write_gguf(tmp_path / "expected.gguf", recipe)
    found = convert(write_hf(tmp_path / "hf", recipe), "f32", tmp_path / "found.gguf").files
    tensors, theirs = GGUFFile(found.path).tensors, GGUFFile(expected.path).tensors
    assert tensors.keys() == theirs.keys()
    for key, tensor in tensors.items():
        assert (tensor.shape, tensor.ggml_type) == (theirs[key].shape, theirs[key].ggml_type)
        np.testing.assert_allclose(tensor.data.view(np.float32), theirs[key].data.view(np.float32), rtol=0, atol=1e-6)
    mine = metadata_that_counts(found)
    for key, value in metadata_that_counts(expected).items():
        assert mine.get(key, 0) == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    assert load_tokenizer(found).encode(TEXT) == load_tokenizer(expected).encode(TEXT)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_llama_and_qwen3_too(tmp_path: Path, family: str) -> None:
    expected = write_tiny_gguf(tmp_path / "expected.gguf", quant="F32", family=family)
    found = convert(write_tiny_hf_llama(tmp_path / "hf", family=family), "f32", tmp_path / "found.gguf").files
    tensors, theirs = GGUFFile(found.path).tensors, GGUFFile(expected.path).tensors
    assert {name: one.data.tobytes() for name, one in tensors.items()} == {
        name: one.data.tobytes() for name, one in theirs.items()
    }
    assert (
        GGUFFile(found.path).metadata["tokenizer.ggml.tokens"]
        == GGUFFile(expected.path).metadata["tokenizer.ggml.tokens"]
    )


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_of_a_gguf_is_that_of_its_source(tmp_path: Path, name: str) -> None:
    """From GGUF and from the directory that it was made of: the same arrays, settings and tokens."""
    hf, gguf = write_hf(tmp_path / "hf", RECIPES[name]), write_gguf(tmp_path / "x.gguf", RECIPES[name])
    first, second = (convert(files, "mlx-4-g32", tmp_path / "out" / files.kind).files for files in (hf, gguf))
    ours, theirs = (load_file(files.path / "model.safetensors") for files in (first, second))
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        assert values.dtype == theirs[key].dtype
        np.testing.assert_allclose(values, theirs[key], rtol=0, atol=1e-6, err_msg=key)
    assert load_tokenizer(first).encode(TEXT) == load_tokenizer(second).encode(TEXT)
    assert json.loads((second.path / "config.json").read_text())["quantization"]["bits"] == 4


def test_mlx_fp8_and_gguf_are_read_back(tmp_path: Path) -> None:
    """Through the readers of the engine: formats by tensor, and values near the source's."""
    source = write_tiny_hf_llama(tmp_path / "hf", hidden=256, ffn=512, dtype="bfloat16")
    config = read_model_config(source)
    dense = open_checkpoint(source, config)
    name, shape = "model.layers.1.mlp.down_proj.weight", (256, 512)
    values = np.asarray(dense.take(name, shape)).astype(np.float32)
    for to, limit in (
        ("mlx-4", 0.2),
        ("mlx-3", 0.4),
        ("mlx-8", 0.02),
        ("fp8", 0.05),
        ("fp8-block", 0.05),
        ("q6_k", 0.05),
    ):
        target = parse_target(to)
        written = convert(source, to, tmp_path / f"out-{target.suffix}").files
        from tinyvllm.arrays import to_float32

        found = to_float32(open_checkpoint(written, read_model_config(written)).take(name, shape))
        assert np.abs(found - values).max() < limit * np.abs(values).max(), to


def test_a_multimodal_source_gives_its_text_model(tmp_path: Path) -> None:
    source = write_multimodal_hf(tmp_path / "hf", RECIPES["gemma3"])
    text = write_hf(tmp_path / "text", RECIPES["gemma3"])
    for to, name in (("q8_0", "x.gguf"), ("mlx-4-g32", "x")):
        first, second = (convert(one, to, tmp_path / "out" / one.path.name / name).files for one in (source, text))
        found, expected = (open_checkpoint(one, read_model_config(one)) for one in (first, second))
        assert found.names() == expected.names()


def test_a_quantized_source_is_converted_again(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "a.gguf", quant="Q8_0", hidden=64)
    first = convert(source, "mlx-8-g32", tmp_path / "mlx").files
    second = convert(first, "q8_0", tmp_path / "b.gguf").files
    third = convert(second, "q4_0", tmp_path / "c.gguf")
    assert GGUFFile(second.path).tensors.keys() == GGUFFile(source.path).tensors.keys()
    assert third.types["Q4_0"] > 0 and third.bits_per_weight < 7
    metadata = GGUFFile(third.files.path).metadata
    assert metadata["general.file_type"] == 2 and metadata["tokenizer.ggml.pre"] == "gpt-2"


def test_memory_stays_below_twice_the_largest_tensor(tmp_path: Path) -> None:
    """Of a dense source only a few rows are in memory, of a quantized one also the codes of a tensor."""
    dense = write_tiny_hf_llama(tmp_path / "hf", vocab=5000, hidden=512, ffn=512, layers=1, dtype="bfloat16")
    largest = 5000 * 512 * 2
    packed = convert(dense, "q8_0", tmp_path / "q8.gguf").files
    for source, to in ((dense, "q4_k_m"), (dense, "mlx-4"), (packed, "q4_0")):
        load_tokenizer(source)
        tracemalloc.start()
        convert(source, to, tmp_path / f"{source.kind}-{to}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"{source.kind} to {to}: peak {peak / 1e6:.1f} MB, largest tensor {largest / 1e6:.1f} MB")
        assert peak < 2 * largest


def test_large_models_are_split_into_files_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_hf_llama(tmp_path / "hf", hidden=64)
    whole = convert(source, "mlx-4-g32", tmp_path / "whole").files
    monkeypatch.setattr(hf_output, "write_headers", partial(safetensors_header.write_headers, file_bytes=8000))
    split = convert(source, "mlx-4-g32", tmp_path / "split").files
    files = sorted(split.path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    together = {name: values for file in files for name, values in load_file(file).items()}
    expected = load_file(whole.path / "model.safetensors")
    assert {name: values.tobytes() for name, values in together.items()} == {
        name: values.tobytes() for name, values in expected.items()
    }
    assert (
        open_checkpoint(split, read_model_config(split)).names()
        == open_checkpoint(whole, read_model_config(whole)).names()
    )


def test_embeddings_and_head_stay_as_they_are_in_fp8(tmp_path: Path) -> None:
    source = write_tiny_hf_llama(tmp_path / "hf", hidden=64, tie=False)
    written = convert(source, "fp8", tmp_path / "fp8").files
    stored, original = (dict(deserialize((one.path / "model.safetensors").read_bytes())) for one in (written, source))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert stored[name] == original[name]
    settings = json.loads((written.path / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["lm_head"] and settings["format"] == "float-quantized"


# ---- Refusals, and what is left behind ----


def failing_disk(*args: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_hf_llama(tmp_path / "hf", hidden=64)
    monkeypatch.setattr(stream, "_write", failing_disk)
    for to, name in (("q8_0", "x.gguf"), ("mlx-4", "x")):
        with pytest.raises(
            ModelError, match=f"out/{name} cannot be written: No space left on device: free some space, or give another"
        ):
            convert(source, to, tmp_path / "out" / name)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_is_replaced_only_if_it_is_asked_for(tmp_path: Path) -> None:
    source = write_tiny_hf_llama(tmp_path / "hf", hidden=64)
    for to, name in (("q8_0", "x.gguf"), ("mlx-4", "x")):
        path = tmp_path / name
        convert(source, to, path)
        with pytest.raises(ModelError, match="exists already: give another --out, or --force to replace it"):
            convert(source, to, path)
        convert(source, to, path, force=True)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["hf", "x", "x.gguf"]


def test_a_full_disk_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ModelError, match=r"needs 0\.00 GB, but .* has 0\.00 GB free"):
        convert(write_tiny_hf_llama(tmp_path / "hf", hidden=64), "q8_0", tmp_path / "x.gguf")


def test_a_directory_that_would_replace_its_source_is_refused(tmp_path: Path) -> None:
    source = write_tiny_hf_llama(tmp_path / "hf", hidden=64)
    with pytest.raises(ModelError, match="is the source itself: give another --out"):
        convert(source, "mlx-4", source.path, force=True)


@pytest.mark.parametrize("text", ["q4", "mlx-7", "mlx-4-g16", "gguf", ""])
def test_an_unknown_target_lists_what_there_is(text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"--to is '.*', which is not known; known: f32, f16, .*mlx-4-g32"):
        parse_target(text)


def test_targets_are_named_in_any_case() -> None:
    assert [parse_target(name.upper()).name for name in KNOWN] == list(KNOWN)
    assert parse_target("mlx-4bit-g64").group == 64 and parse_target("FP8-channel").name == "fp8"


def change(directory: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    path = directory / name
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    source = write_tiny_hf_llama(tmp_path / "hf", hidden=64)
    pattern = {"type": "Split", "pattern": {"Regex": "[a-e]+"}, "behavior": "Isolated", "invert": False}
    change(source.path, "tokenizer.json", lambda value: value["pre_tokenizer"].update(
        {"type": "Sequence", "pretokenizers": [pattern, dict(value["pre_tokenizer"])]}
    ))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"splits texts into words in a way that has no name in llama.cpp"):
        convert(source, "q8_0", tmp_path / "x.gguf")
    convert(source, "mlx-4", tmp_path / "mlx")  # a directory keeps its tokenizer


def test_a_setting_that_the_target_cannot_say_is_refused(tmp_path: Path) -> None:
    """GGUF has no place for the layers of Qwen's window, which a reader would take for none."""
    source = write_hf(tmp_path / "hf", RECIPES["qwen2_windowed"])
    with pytest.raises(
        UnsupportedModelError, match=r"hf cannot be written as q8_0: .*sliding_window is 19, which is not supported"
    ):
        convert(source, "q8_0", tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("smollm3", "model.layers.0.self_attn.o_proj.bias would be blk.0.attn_output.bias"),
        ("smollm3", "model.layers.0.mlp.up_proj.bias would be blk.0.ffn_up.bias"),
        ("qwen3", "model.layers.0.self_attn.o_proj.bias would be blk.0.attn_output.bias"),
        ("qwen2", "model.layers.0.mlp.up_proj.bias would be blk.0.ffn_up.bias"),
    ],
)
def test_a_bias_that_llama_cpp_does_not_load_has_no_name(family: str, tensor: str) -> None:
    """llama.cpp loads all of a llama or granite file, and those of queries, keys and values of qwen2 and glm4."""
    hf_name, *_, name = tensor.split()
    assert gguf_name(hf_name, "llama", 2) == gguf_name(hf_name, "granite", 2) == name
    assert gguf_name("model.layers.0.self_attn.q_proj.bias", "glm4", 2) == "blk.0.attn_q.bias"
    with pytest.raises(
        UnsupportedModelError, match=f"{tensor} in GGUF, which llama.cpp does not load in a {family} model"
    ):
        gguf_name(hf_name, family, 2)


def test_biases_of_smollm3_are_refused_in_gguf(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", RECIPES["smollm3"])
    with pytest.raises(UnsupportedModelError, match=r"tensor model\.layers\.0\..*bias in GGUF, which llama.cpp does"):
        convert(source, "q8_0", tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_without_merges_is_named_by_its_file(tmp_path: Path) -> None:
    source = write_tiny_hf_llama(tmp_path / "hf", hidden=64)
    change(source.path, "tokenizer.json", lambda value: value["model"].update(merges=[]))
    with pytest.raises(
        UnsupportedModelError, match=r"hf/tokenizer.json has no merges, which a GGUF file cannot be without"
    ):
        convert(source, "q8_0", tmp_path / "x.gguf")


def test_experts_of_a_gguf_file_are_quantized_and_directories_of_them_refused(tmp_path: Path) -> None:
    recipe = RECIPES["qwen3_moe"]
    source = write_gguf(tmp_path / "x.gguf", recipe)
    written = convert(source, "q8_0", tmp_path / "y.gguf").files
    name, before = "blk.0.ffn_down_exps.weight", GGUFFile(source.path).tensors
    tensor = GGUFFile(written.path).tensors[name]
    assert (tensor.ggml_type, tensor.shape) == ("Q8_0", before[name].shape)
    values = before[name].data.view(np.float32).reshape(-1, before[name].shape[-1])
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(tensor.data, expected.reshape(-1))
    again = convert(written, "f16", tmp_path / "z.gguf").files
    assert GGUFFile(again.path).tensors[name].ggml_type == "F16"
    for to in ("mlx-4", "fp8"):
        with pytest.raises(ModelError, match="has experts, which are not written as"):
            convert(write_hf(tmp_path / f"hf-{to}", recipe), to, tmp_path / to)
    with pytest.raises(ModelError, match=r"can then be quantized$"):  # and no word of what is refused as well
        convert(write_hf(tmp_path / "hf", recipe), "q8_0", tmp_path / "w.gguf")
