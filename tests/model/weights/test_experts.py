"""Experts of a layer as one matrix each of gate, up and down, however files hold them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from ml_dtypes import bfloat16, float8_e4m3fn

from tests.families.mlx import quantize_affine
from tests.families.recipe import make_weights
from tests.families.recipes import RECIPES
from tests.model.weights.hf_formats.directory import assemble
from tests.model.weights.hf_formats.test_layouts import interleave
from tinyvllm.arrays import E2M1, LazyCodes, QuantizedMatrix, to_float32
from tinyvllm.config import ExpertsKind, ModelConfig, Rope
from tinyvllm.errors import ModelError, UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.experts import stack_experts
from tinyvllm.model.weights.gguf import read_gguf
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.ops.backend import expert_gate_over_up

EXPERTS, FFN, HIDDEN = 4, 64, 256
LAYER = "model.layers.0."
RNG = np.random.default_rng(0)
CONFIG = ModelConfig(
    architecture="qwen3_moe",
    num_layers=1,
    hidden_size=HIDDEN,
    ffn_size=FFN,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=64,
    max_position=64,
    rope=Rope(1e4),
    norm_eps=1e-6,
    tie_embeddings=False,
    experts=ExpertsKind(EXPERTS, 2, FFN),
)
VALUES = {
    "gate": RNG.standard_normal((EXPERTS, FFN, HIDDEN)).astype(np.float32),
    "up": RNG.standard_normal((EXPERTS, FFN, HIDDEN)).astype(np.float32),
    "down": RNG.standard_normal((EXPERTS, HIDDEN, FFN)).astype(np.float32),
}
BIASES = {"gate": (EXPERTS, FFN), "up": (EXPERTS, FFN), "down": (EXPERTS, HIDDEN)}
EXPECTED = {f"{LAYER}mlp.experts.{name}_proj.weight": v.reshape(-1, v.shape[-1]) for name, v in VALUES.items()}


def read(tensors: Mapping[str, StoredTensor], *, alternate: bool = False) -> dict[str, Any]:
    stacked = stack_experts(Path("x"), tensors, CONFIG, alternate=alternate)
    for name, tensor in stacked.items():
        assert tensor.read().shape == tensor.shape, name
    return {name: tensor.read() for name, tensor in stacked.items()}


def stored(values: Mapping[str, np.ndarray]) -> dict[str, StoredTensor]:
    def one(array: np.ndarray) -> StoredTensor:
        return StoredTensor(array.shape, lambda: array, str(array.dtype), array.nbytes)

    return {LAYER + name: one(array) for name, array in values.items()}


# -- layouts -----------------------------------------------------------------------------------------------------------


def each(block: str, gate: str, up: str, down: str) -> dict[str, np.ndarray]:
    names = {"gate": gate, "up": up, "down": down}
    return {
        f"{block}.experts.{expert}.{names[module]}.weight": array[expert]
        for module, array in VALUES.items()
        for expert in reversed(range(EXPERTS))
    }


def whole(prefix: str) -> dict[str, np.ndarray]:
    return {f"{prefix}.{module}_proj.weight": array for module, array in VALUES.items()}


def fused(prefix: str, gate_up: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": VALUES["down"]}


HALVES = np.concatenate([VALUES["gate"], VALUES["up"]], axis=1)
ALTERNATING = np.stack([VALUES["gate"], VALUES["up"]], axis=2).reshape(HALVES.shape)
TURNED = {"mlp.experts.down_proj": VALUES["down"].swapaxes(1, 2)}
LAYOUTS = {
    "one by one": each("mlp", "gate_proj", "up_proj", "down_proj"),
    "Mixtral": each("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen3.5": fused("mlp.experts", HALVES),
    "Gemma 4": fused("experts", HALVES),
    "Qwen3-VL": TURNED | {"mlp.experts.gate_up_proj": HALVES.swapaxes(1, 2)},
    "MLX": whole("mlp.switch_mlp"),
    "MLX's Mixtral": whole("block_sparse_moe.switch_mlp"),
    "MLX's Gemma 4": whole("experts.switch_glu"),
    "GGUF": whole("mlp.experts"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(layout: str) -> None:
    found = read(stored(LAYOUTS[layout]))
    assert found.keys() == EXPECTED.keys()
    for name, values in EXPECTED.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_matrices_are_joined_by_several_threads(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr("tinyvllm.arrays.THREADED_BYTES", 0)
    kind = np.dtype(bfloat16 if dtype == "bfloat16" else dtype)
    found = read(stored({name: array.astype(kind) for name, array in LAYOUTS["one by one"].items()}))
    for name, values in EXPECTED.items():
        assert found[name].dtype == kind
        np.testing.assert_array_equal(found[name], values.astype(kind), err_msg=name)
    gate, up = (found[f"{LAYER}mlp.experts.{module}_proj.weight"] for module in ("gate", "up"))
    both = expert_gate_over_up(gate, up, EXPERTS)
    assert isinstance(both, np.ndarray)
    np.testing.assert_array_equal(both, HALVES.reshape(-1, HIDDEN).astype(kind))


def test_alternating_rows_are_told_apart_in_matrices_and_biases() -> None:
    biases = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in BIASES.items()}
    both = np.stack([biases["gate"], biases["up"]], axis=2).reshape(EXPERTS, -1)
    more = {"mlp.experts.gate_up_proj_bias": both, "mlp.experts.down_proj_bias": biases["down"]}
    found = read(stored(TURNED | {"mlp.experts.gate_up_proj": ALTERNATING.swapaxes(1, 2)} | more), alternate=True)
    for module, bias in biases.items():
        np.testing.assert_array_equal(found[f"{LAYER}mlp.experts.{module}_proj.bias"], bias.reshape(-1))
    for name, values in EXPECTED.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_dense_family_s_names_stay() -> None:
    tensors = stored({"router.weight": np.zeros((2, 2), np.float32)})
    assert stack_experts(Path("x"), tensors, RECIPES_CONFIG, alternate=False) == tensors


RECIPES_CONFIG = ModelConfig(**{**vars(CONFIG), "experts": None})


# -- formats -----------------------------------------------------------------------------------------------------------


def by_expert(make: Any) -> dict[str, np.ndarray]:
    """Tensors of every expert's matrices: `make` (expert, values) -> by the ends of their names."""
    return {
        f"{LAYER}mlp.experts.{expert}.{module}_proj{end}": part
        for module, array in VALUES.items()
        for expert in range(EXPERTS)
        for end, part in make(expert, array[expert]).items()
    }


def test_experts_in_fp8_stay_packed_and_are_unpacked_later(tmp_path: Path) -> None:
    def block(expert: int, values: np.ndarray) -> dict[str, np.ndarray]:
        scale = np.full((-(-len(values) // 128), -(-values.shape[1] // 128)), 0.5 + expert, np.float32)
        return {".weight": values.astype(float8_e4m3fn), ".weight_scale_inv": scale}

    found = read(assemble(tmp_path, {"quant_method": "fp8"}, by_expert(block)))
    factors = np.repeat(0.5 + np.arange(EXPERTS), FFN)[:, None]
    matrix = found[f"{LAYER}mlp.experts.up_proj.weight"]
    assert matrix.format.name == "fp8-block128" and isinstance(matrix.codes, LazyCodes)
    expected = EXPECTED[f"{LAYER}mlp.experts.up_proj.weight"].astype(float8_e4m3fn).astype(np.float32) * factors
    np.testing.assert_array_equal(to_float32(matrix), expected)


def fused_fp8(size: int) -> dict[str, np.ndarray]:
    """All experts' gate and up projections, of `size` rows each, with a scale for each block."""
    rows, cols = 2 * size, HIDDEN
    blocks = np.arange(EXPERTS * -(-rows // 128) * (cols // 128), dtype=np.float32).reshape(EXPERTS, -1, cols // 128)
    name = f"{LAYER}mlp.experts.gate_up_proj"
    return {name: np.ones((EXPERTS, rows, cols), float8_e4m3fn), f"{name}_scale_inv": blocks}


def test_experts_in_one_fp8_tensor_have_scales_for_their_own_blocks(tmp_path: Path) -> None:
    tensors = fused_fp8(FFN)
    found = read(assemble(tmp_path, {"quant_method": "fp8", "weight_block_size": [128, 128]}, tensors))
    blocks = tensors[f"{LAYER}mlp.experts.gate_up_proj_scale_inv"]  # (E, 1, columns / 128)
    for module in ("gate", "up"):
        expected = np.repeat(np.repeat(blocks, FFN, axis=1), 128, axis=2).reshape(-1, HIDDEN)
        np.testing.assert_array_equal(to_float32(found[f"{LAYER}mlp.experts.{module}_proj.weight"]), expected)
    with pytest.raises(UnsupportedModelError, match="experts of 96 rows in blocks of 128"):
        assemble(tmp_path / "odd", {"quant_method": "fp8"}, fused_fp8(48))


def test_experts_in_nvfp4_keep_their_own_global_scales(tmp_path: Path) -> None:
    def nvfp4(expert: int, values: np.ndarray) -> dict[str, np.ndarray]:
        rows, cols = values.shape
        return {
            ".weight_packed": np.full((rows, cols // 2), 0x22, np.uint8),
            ".weight_scale": np.full((rows, cols // 16), 1.5, float8_e4m3fn),
            ".weight_global_scale": np.array([2.0**expert], np.float32),
        }

    found = read(assemble(tmp_path, {"quant_method": "compressed-tensors"}, by_expert(nvfp4)))
    matrix = found[f"{LAYER}mlp.experts.down_proj.weight"]
    rows = np.repeat(1.5 * E2M1[2] / 2.0 ** np.arange(EXPERTS), HIDDEN)
    np.testing.assert_array_equal(to_float32(matrix), np.broadcast_to(rows[:, None], matrix.shape))


def awq(expert: int, values: np.ndarray) -> dict[str, np.ndarray]:
    """Zero points in the middle for the first expert, whose format then has none."""
    rows, cols = values.shape
    codes = np.random.default_rng(expert).integers(0, 16, (cols, rows), np.uint8)
    zeros = np.full((cols // 64, rows), 8 if expert == 0 else 5, np.uint8)
    scales = np.full((cols // 64, rows), 0.25, np.float16)
    return {".qweight": interleave(codes), ".qzeros": interleave(zeros), ".scales": scales}


def test_experts_whose_formats_differ_get_a_common_one(tmp_path: Path) -> None:
    found = read(assemble(tmp_path, {"quant_method": "awq", "bits": 4}, by_expert(awq)))
    matrix = found[f"{LAYER}mlp.experts.gate_proj.weight"]
    assert isinstance(matrix, QuantizedMatrix) and matrix.format.bits == 4
    codes = [np.random.default_rng(expert).integers(0, 16, (HIDDEN, FFN), np.uint8).T for expert in range(EXPERTS)]
    expected = np.concatenate([(c.astype(np.float32) - (5 if e else 8)) * 0.25 for e, c in enumerate(codes)])
    np.testing.assert_array_equal(to_float32(matrix), expected)


def test_experts_without_a_common_format_become_float16_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def mixed(expert: int, values: np.ndarray) -> dict[str, np.ndarray]:
        return {".weight": values} if expert == 2 else awq(expert, values)

    with caplog.at_level(logging.WARNING):
        found = read(assemble(tmp_path, {"quant_method": "awq", "bits": 4}, by_expert(mixed)))
    assert {str(matrix.dtype) for matrix in found.values()} == {"float16"}
    assert f"{LAYER}mlp.experts.gate_proj.weight: experts in awq-4bit-g64, float32 have no common format" in caplog.text


def test_alternating_rows_of_mxfp4_are_told_apart(tmp_path: Path) -> None:
    blocks = RNG.integers(0, 256, (EXPERTS, 2 * FFN, HIDDEN // 32, 16), np.uint8)
    scales = RNG.integers(120, 130, (EXPERTS, 2 * FFN, HIDDEN // 32), np.uint8)
    name = f"{LAYER}mlp.experts.gate_up_proj"
    tensors = assemble(tmp_path, {"quant_method": "mxfp4"}, {f"{name}_blocks": blocks, f"{name}_scales": scales})
    both = to_float32(tensors[name].read()).reshape(EXPERTS, FFN, 2, HIDDEN)
    found = read(tensors, alternate=True)
    for place, module in enumerate(("gate", "up")):
        matrix = found[f"{LAYER}mlp.experts.{module}_proj.weight"]
        assert isinstance(matrix.codes, LazyCodes)
        np.testing.assert_array_equal(to_float32(matrix), both[:, :, place].reshape(-1, HIDDEN))


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        ((6, 64, 3, 15), np.zeros((6, 64, 3), np.uint8), r"shape \(6, 64, 3, 15\), but 32 codes take 16 bytes"),
        ((16,), np.zeros((), np.uint8), r"shape \(16,\), but 32 codes take 16 bytes"),
        ((6, 64, 3, 16), np.zeros((6, 64, 2), np.uint8), r"down_proj_scales has shape \(6, 64, 2\)"),
        (
            (6, 64, 3, 16),
            np.zeros((6, 64, 3), np.float32),
            "blocks of type U8 and scales of float32: MXFP4 has U8 in both",
        ),
    ],
)
def test_mxfp4_of_other_sizes_and_types_is_named(
    tmp_path: Path, blocks: tuple[int, ...], scales: np.ndarray, message: str
) -> None:
    name = f"{LAYER}mlp.experts.down_proj"
    with pytest.raises(ModelError, match=message):
        assemble(
            tmp_path,
            {"quant_method": "mxfp4"},
            {f"{name}_blocks": np.zeros(blocks, np.uint8), f"{name}_scales": scales},
        )


def test_mlx_s_stacks_are_read(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {}
    for module, array in VALUES.items():
        parts = quantize_affine(array, 32, 4)
        tensors |= {f"{LAYER}mlp.switch_mlp.{module}_proj.{end}": part for end, part in parts.items()}
    found = read(assemble(tmp_path, {"group_size": 32, "bits": 4}, tensors))
    for name, values in EXPECTED.items():
        assert found[name].format.name == "mlx-4bit-g32"
        assert np.abs(to_float32(found[name]) - values).max() < 0.4


# -- GGUF --------------------------------------------------------------------------------------------------------------


def write(path: Path, tensors: Mapping[str, np.ndarray], kind: str) -> Path:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for name, values in tensors.items():
        quantized = kind != "F32" and values.ndim > 1
        kind_of = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(
            name,
            gguf.quants.quantize(values, kind_of) if quantized else values,
            raw_dtype=kind_of if quantized else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_stacks_of_gguf_stay_packed(tmp_path: Path) -> None:
    names = {f"blk.0.ffn_{module}_exps.weight": array for module, array in VALUES.items()}
    found = read(read_gguf(write(tmp_path / "x.gguf", names, "Q8_0"), CONFIG))
    for name, values in EXPECTED.items():
        assert found[name].format.name == "Q8_0"
        quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        expected = gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q8_0)
        np.testing.assert_allclose(to_float32(found[name]), expected, rtol=1e-6)


def test_fused_and_older_names_of_gguf_are_read(tmp_path: Path) -> None:
    old = {f"blk.0.ffn_down.{expert}.weight": VALUES["down"][expert] for expert in range(EXPERTS)}
    names = {"blk.0.ffn_gate_up_exps.weight": HALVES, "blk.0.ffn_gate_inp_shexp.weight": HALVES[0, 0]} | old
    found = read(read_gguf(write(tmp_path / "x.gguf", names, "F32"), CONFIG))
    for name, values in EXPECTED.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    np.testing.assert_array_equal(found[f"{LAYER}mlp.shared_expert_gate.weight"], HALVES[0, :1])


@pytest.mark.parametrize("count", [EXPERTS, 3])
def test_nvfp4_of_gguf_has_a_scale_for_each_expert(tmp_path: Path, count: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3moe")
    raw = np.full((EXPERTS, FFN, HIDDEN // 64 * 36), 0x22, np.uint8)
    writer.add_tensor("blk.0.ffn_up_exps.weight", raw, raw_dtype=gguf.GGMLQuantizationType.NVFP4)
    writer.add_tensor("blk.0.ffn_up_exps.scale", np.arange(1, count + 1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if count != EXPERTS:
        with pytest.raises(UnsupportedModelError, match="supported is F32 of 4 experts"):
            read_gguf(tmp_path / "x.gguf", CONFIG)
        return
    (matrix,) = read(read_gguf(tmp_path / "x.gguf", CONFIG)).values()
    firsts = to_float32(matrix)[::FFN, 0]
    np.testing.assert_allclose(firsts / firsts[0], [1, 2, 3, 4])


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp.experts.2.up_proj.weight": None}, r"no tensor .*up_proj.weight of expert 2: .* ask for experts 0 to 3"),
        ({"mlp.experts.4.up_proj.weight": VALUES["up"][0]}, "a tensor .*up_proj.weight of expert 4"),
        (
            {"mlp.experts.1.down_proj.weight": VALUES["up"][0]},
            r"of expert 1 has shape \(64, 256\), but the model's settings ask for \(256, 64\)",
        ),
    ],
)
def test_experts_that_do_not_fit_the_settings_are_named(change: dict[str, Any], message: str) -> None:
    tensors = {name: array for name, array in (LAYOUTS["one by one"] | change).items() if array is not None}
    with pytest.raises(WeightMismatchError, match=message):
        read(stored(tensors))


def test_a_stack_of_another_shape_is_named() -> None:
    with pytest.raises(WeightMismatchError, match=r"gate_up_proj has shape \(3, 128, 256\), but .* \(4, 128, 256\)"):
        read(stored({"mlp.experts.gate_up_proj": HALVES[:3]}))


def test_the_recipes_names_are_all_known() -> None:
    """Of every sparse family: no tensor of a layer keeps a name of its own."""
    known = ("self_attn.", "mlp.gate.", "mlp.experts.", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "layer_scalar")
    for name in ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "gemma4_26b"):
        recipe = RECIPES[name]
        kind = ExpertsKind(
            recipe.config.get("num_experts") or recipe.config["num_local_experts"],
            2,
            recipe.config.get("moe_intermediate_size") or recipe.config["intermediate_size"],
        )
        config = ModelConfig(**{**vars(CONFIG), "experts": kind, "hidden_size": recipe.config["hidden_size"]})
        tensors = {n: StoredTensor(w.shape, lambda: np.zeros(0), "float32", 0) for n, w in make_weights(recipe).items()}
        stacked = stack_experts(Path("x"), tensors, config, alternate=name == "gpt_oss")
        rests = [found.split(".", 3)[3] for found in stacked if found.startswith("model.layers.")]
        assert all(
            rest.startswith(known) or rest.endswith("layernorm.weight") or "_layernorm_" in rest for rest in rests
        )
        assert "mlp.experts.gate_proj.weight" in rests
