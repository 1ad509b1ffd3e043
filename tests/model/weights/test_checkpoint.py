"""Both formats give the same weights under the same names, and nothing missing or left over goes unnoticed."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.builders import (
    LLAMA3_SCALING,
    WIDE,
    GGUFTweaks,
    TinyLlama,
    encode_floats,
    make_weights,
    write_safetensors,
    write_tiny_gguf,
    write_tiny_hf_llama,
)
from tinyvllm.arrays import QuantizedMatrix, to_float32
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.checkpoint import Checkpoint, format_lines, open_checkpoint, unread_lines
from tinyvllm.model.weights.gguf import canonical_name
from tinyvllm.model.weights.quant import QUANTIZED_KINDS
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.storage.catalog import DEFAULT_MODEL
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.model_config import read_model_config
from tinyvllm.storage.resolve import resolve_model

Q_NAME = "model.layers.0.self_attn.q_proj.weight"


def open_files(files: ModelFiles) -> Checkpoint:
    return open_checkpoint(files, read_model_config(files))


def take_all(files: ModelFiles, **numbers: Any) -> dict[str, np.ndarray]:
    """Every tensor of the model, in float32; finish() is content."""
    checkpoint = open_files(files)
    shapes = {name: weight.shape for name, weight in make_weights(TinyLlama(**numbers)).items()}
    assert checkpoint.names() == sorted(shapes)
    taken = {name: to_float32(checkpoint.take(name, shape)) for name, shape in shapes.items()}
    checkpoint.finish()
    return taken


def assert_same(taken: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, weight in expected.items():
        np.testing.assert_array_equal(taken[name], weight, err_msg=name)


def as_stored(weight: np.ndarray, dtype: str) -> np.ndarray:
    return to_float32(encode_floats(weight, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_directory_gives_the_weights_that_were_written(tmp_path: Path, dtype: str, shards: int) -> None:
    taken = take_all(write_tiny_hf_llama(tmp_path / "m", dtype=dtype, shards=shards, tie=False), tie=False)
    assert_same(taken, {name: as_stored(w, dtype) for name, w in make_weights(TinyLlama(tie=False)).items()})


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
@pytest.mark.parametrize("numbers", [{}, {"tie": False, "hidden": 96, "kv_heads": 1, "head_dim": 32}])
def test_unquantized_gguf_gives_the_directory_s_weights_in_its_order(
    tmp_path: Path, kind: str, dtype: str, numbers: dict[str, Any]
) -> None:
    taken = take_all(write_tiny_gguf(tmp_path / "m.gguf", quant=kind, **numbers), **numbers)
    weights = make_weights(TinyLlama(**numbers))
    assert_same(taken, {name: as_stored(w, dtype) if w.ndim == 2 else w for name, w in weights.items()})


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_gguf_gives_each_row_s_own_quantization(tmp_path: Path, kind: str) -> None:
    """Blocks lie within rows, so reordering rows and quantizing may be done in either order."""
    taken = take_all(write_tiny_gguf(tmp_path / "m.gguf", quant=kind))
    for name, weight in make_weights(TinyLlama()).items():
        if weight.ndim == 2:
            quantization = gguf.GGMLQuantizationType[kind]
            weight = gguf.quants.dequantize(gguf.quants.quantize(weight, quantization), quantization)
        np.testing.assert_array_equal(taken[name], weight, err_msg=name)


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZED_KINDS if kind in gguf.GGMLQuantizationType.__members__])
def test_quantized_matrices_stay_quantized(tmp_path: Path, kind: Any) -> None:
    files = write_tiny_gguf(tmp_path / "m.gguf", quant=kind, tweaks=GGUFTweaks(quant_of={"ffn_down": "Q6_K"}), **WIDE)
    checkpoint = open_files(files)
    q = checkpoint.take(Q_NAME, (256, 256))
    down = checkpoint.take("model.layers.1.mlp.down_proj.weight", (256, 512))
    assert isinstance(q, QuantizedMatrix)
    assert isinstance(down, QuantizedMatrix)
    assert (q.format.name, down.format.name) == (kind, "Q6_K")


def test_the_scale_of_an_nvfp4_matrix_multiplies_it(tmp_path: Path) -> None:
    """llama.cpp's converter writes it as a tensor beside the weight; one for inputs, which stay floats here, too."""
    wide: dict[str, Any] = WIDE
    scales = {"blk.0.attn_q.scale": 0.25, "blk.1.ffn_up.scale": 3.0, "blk.1.ffn_up.input_scale": 7.0}
    tweaks = GGUFTweaks(extra={name: np.array([value]) for name, value in scales.items()})
    alone = take_all(write_tiny_gguf(tmp_path / "a.gguf", quant="NVFP4", **wide), **wide)
    scaled = take_all(write_tiny_gguf(tmp_path / "m.gguf", quant="NVFP4", tweaks=tweaks, **wide), **wide)
    factors = {Q_NAME: 0.25, "model.layers.1.mlp.up_proj.weight": 3.0}
    assert_same(scaled, {name: weight * factors.get(name, 1.0) for name, weight in alone.items()})


def test_dense_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    for files in (write_tiny_hf_llama(tmp_path / "m"), write_tiny_gguf(tmp_path / "m.gguf", quant="F32")):
        matrix = open_files(files).take("model.layers.0.mlp.up_proj.weight", (96, 64))
        assert isinstance(matrix, np.ndarray)
        assert not matrix.flags.owndata
        assert not matrix.flags.writeable


def test_rope_divisors_are_no_surplus(tmp_path: Path) -> None:
    taken = take_all(write_tiny_gguf(tmp_path / "m.gguf", quant="F32", rope_scaling=LLAMA3_SCALING))
    assert_same(taken, make_weights(TinyLlama()))


def test_buffers_and_the_copy_of_a_tied_head_are_ignored(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m")
    weights = make_weights(TinyLlama())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    write_safetensors(files.path / "model.safetensors", weights)
    assert_same(take_all(files), make_weights(TinyLlama()))


# --- strictness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_missing_tensor_is_named(tmp_path: Path, form: str) -> None:
    if form == "gguf":
        files = write_tiny_gguf(tmp_path / "m.gguf", tweaks=GGUFTweaks(drop=("blk.0.attn_q.weight",)))
    else:
        files = write_tiny_hf_llama(tmp_path / "m")
        weights = make_weights(TinyLlama())
        del weights[Q_NAME]
        write_safetensors(files.path / "model.safetensors", weights)
    with pytest.raises(WeightMismatchError, match=rf"has no tensor {Q_NAME} \(shape \(64, 64\)\)"):
        open_files(files).take(Q_NAME, (64, 64))


@pytest.mark.parametrize(
    ("packed", "missing"),
    [
        ("mlp.experts.gate_up_proj_blocks", "mlp.experts.gate_proj.weight"),
        ("self_attn.q_proj.qweight", "self_attn.q_proj.weight"),
    ],
)
def test_a_quantized_module_without_settings_is_named(tmp_path: Path, packed: str, missing: str) -> None:
    codes = StoredTensor((4, 4), lambda: np.zeros((4, 4), np.uint8), "uint8", 16, False)
    checkpoint = Checkpoint(tmp_path, {f"model.layers.0.{packed}": codes})
    with pytest.raises(
        WeightMismatchError, match=rf"quantized \(model\.layers\.0\.{packed}\), but config\.json has no"
    ):
        checkpoint.take(f"model.layers.0.{missing}", (4, 4))


def test_surplus_tensors_are_named(tmp_path: Path) -> None:
    tweaks = GGUFTweaks(extra={"blk.0.attn_q.bias": np.ones(64), "strange.weight": np.ones(3)})
    checkpoint = open_files(write_tiny_gguf(tmp_path / "m.gguf", tweaks=tweaks))
    for name, weight in make_weights(TinyLlama()).items():
        checkpoint.take(name, weight.shape)
    with pytest.raises(
        WeightMismatchError,
        match=r"has 2 tensor\(s\) that .*: model\.layers\.0\.self_attn\.q_proj\.bias, strange\.weight$",
    ):
        checkpoint.finish()


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path, form: str) -> None:
    files = write_tiny_gguf(tmp_path / "m.gguf") if form == "gguf" else write_tiny_hf_llama(tmp_path / "m")
    with pytest.raises(WeightMismatchError, match=rf"{Q_NAME} has shape \(64, 64\), but .* ask for \(64, 32\)"):
        open_files(files).take(Q_NAME, (64, 32))


def test_unknown_quantization_lists_the_known_before_anything_is_read(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", layers=1, quant="F16").path
    content = path.read_bytes()
    name = b"blk.0.attn_v.weight"
    type_at = content.index(name) + len(name) + 4 + 16  # two dimensions' count and lengths come between
    kind = int(gguf.GGMLQuantizationType.I8).to_bytes(4, "little")
    path.write_bytes(content[:type_at] + kind + content[type_at + 4 :])
    with pytest.raises(
        UnsupportedModelError, match=r"blk\.0\.attn_v\.weight has type I8, .*known: F32, F16, BF16, Q4_0, .*Q6_K"
    ):
        open_files(ModelFiles("gguf", path, "m"))


# --- files of a directory ----------------------------------------------------------------------------------------


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m", shards=2)
    (files.path / "model.safetensors.index.json").unlink()
    assert_same(take_all(files), make_weights(TinyLlama()))


def test_files_that_the_index_does_not_list_are_not_read(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m", shards=2)
    write_safetensors(files.path / "adapter.safetensors", {"strange.weight": np.ones(3, np.float32)})
    assert_same(take_all(files), make_weights(TinyLlama()))


def test_file_that_the_index_lists_must_be_there(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m", shards=2)
    (files.path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"index\.json lists 'model-00002-of-00002\.safetensors', which is not there"):
        open_files(files)


def test_index_without_a_map_is_named(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m", shards=2)
    (files.path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json has no weight_map"):
        open_files(files)


def test_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m", shards=2)
    (files.path / "model.safetensors.index.json").unlink()
    write_safetensors(files.path / "model-00003.safetensors", {Q_NAME: np.ones((64, 64), np.float32)})
    with pytest.raises(WeightMismatchError, match=f"has tensor {Q_NAME}, which another file"):
        open_files(files)


def test_pickled_weights_are_refused_and_never_preferred(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m")
    (files.path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    take_all(files)
    (files.path / "model.safetensors").unlink()
    with pytest.raises(
        UnsupportedModelError, match=r"pickle files \(pytorch_model\.bin\).*convert them to safetensors"
    ):
        open_files(files)
    (files.path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no \*\.safetensors"):
        open_files(files)


def test_cut_file_says_so_wherever_it_was_cut(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m", layers=1)
    path = files.path / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 8, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors is (cut short|damaged)"):
            open_files(files)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[1, 2]", "is cut short or damaged .*its header is not a JSON object"),
        ("{not json", "is cut short or damaged .*cannot read its header: Expecting property name"),
        ('{"a": {"dtype": "F32", "shape": [4]}}', "is cut short or damaged .*'a' has the data_offsets None"),
        (
            '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}',
            r"is cut short or damaged .*takes 16 bytes, but its data_offsets are \[0, 8\]",
        ),
    ],
)
def test_damaged_header_is_named(tmp_path: Path, header: str, message: str) -> None:
    files = write_tiny_hf_llama(tmp_path / "m")
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(64)
    (files.path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_files(files)


def test_pointer_of_git_lfs_is_recognized(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m")
    (files.path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ModelError, match="pointer of Git LFS"):
        open_files(files)


def test_unknown_type_lists_the_known(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "m")
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}})
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    (files.path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        UnsupportedModelError, match="tensor a has type F8_E4M3, which is not supported; known: F32, F16, BF16"
    ):
        open_files(files).take("a", (4,))


@pytest.mark.model
def test_default_model_is_taken_whole() -> None:
    files = resolve_model(DEFAULT_MODEL)
    checkpoint = open_files(files)
    tensors = GGUFFile(files.path).tensors
    for tensor in tensors.values():
        matrix = checkpoint.take(canonical_name(tensor.name, "llama"), tensor.shape)
        assert isinstance(matrix, QuantizedMatrix) == (len(tensor.shape) == 2)
    checkpoint.finish()
    assert len(checkpoint.names()) == len(tensors) == 272


# --- formats -----------------------------------------------------------------------------------------------------


def test_biases_of_zeros_are_no_surplus(tmp_path: Path) -> None:
    """AutoGPTQ writes them for every matrix."""
    files = write_tiny_hf_llama(tmp_path / "m")
    weights = make_weights(TinyLlama())
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    write_safetensors(files.path / "model.safetensors", weights)
    checkpoint = open_files(files)
    for name, weight in make_weights(TinyLlama()).items():
        checkpoint.take(name, weight.shape)
    checkpoint.finish()


def test_formats_are_logged_by_the_matrices_that_have_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tweaks = GGUFTweaks(quant_of={"ffn_down": "Q6_K"})
    files = write_tiny_gguf(tmp_path / "m.gguf", quant="Q4_0", tweaks=tweaks, **WIDE)
    with caplog.at_level(logging.INFO):
        open_files(files)
    assert "down_proj: Q6_K" in caplog.text
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().endswith(": Q4_0")]
    assert {"embed_tokens", "q_proj", "o_proj", "up_proj"} < set(re.findall(r"\w+", line))


def test_a_rerankers_rows_of_yes_and_no_become_one_label(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    tweaks = GGUFTweaks(metadata={"qwen3.pooling_type": 4}, extra={"cls.output.weight": rows})
    files = write_tiny_gguf(tmp_path / "tiny.gguf", quant="F32", tweaks=tweaks, family="qwen3")
    config = read_model_config(files)
    assert (config.num_labels, config.has_head, config.pooling) == (1, False, None)
    taken = open_checkpoint(files, config).take("score.weight", (1, 64))
    np.testing.assert_array_equal(to_float32(taken), rows[:1] - rows[1:])


def test_what_a_text_model_leaves_out_is_logged_by_part() -> None:
    def stored(nbytes: int) -> StoredTensor:
        return StoredTensor((nbytes,), lambda: np.zeros(0), "F8", nbytes)

    names = ("vision_tower.a", "vision_tower.b", "embed_audio.c", "model.norm.weight")
    tensors = {f"model.{name}": stored(2 * 10**8) for name in names}
    assert unread_lines(tensors, ("model.vision_tower.", "model.audio_tower.", "model.embed_audio.")) == [
        "vision tower: 2 tensors, 0.4 GB not loaded: this model runs text only",
        "embed audio: 1 tensors, 0.2 GB not loaded: this model runs text only",
    ]


def test_conversions_are_logged_with_their_bytes() -> None:
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": StoredTensor((1024, 1024), lambda: np.zeros(1), "nf4", 2**19, True)
        for i in range(8)
    }
    assert format_lines(tensors) == [
        "up_proj: nf4",
        "8 matrices in nf4 are converted to float16, because no packed format here holds them: "
        "they take 16 MiB instead of 4",
    ]
