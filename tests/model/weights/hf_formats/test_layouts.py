"""AWQ, GPTQ, FP8 and ModelOpt: matrices packed here as their layouts are documented, and read back exactly."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16, float8_e4m3fn, float8_e5m2
from safetensors.numpy import save_file

from tests.builders import write_json
from tests.model.weights.hf_formats.directory import assemble, check
from tinyvllm.arrays import E2M1, LazyCodes, QuantizedMatrix, stack_rows, to_float32
from tinyvllm.errors import UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.hf_formats import METHODS, assemble_matrices
from tinyvllm.model.weights.hf_formats.matrices import unpack_bits
from tinyvllm.model.weights.safetensors import read_safetensors

ROWS, COLS = 64, 256
RNG = np.random.default_rng(0)


def float32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """(N, K) codes -> (N, K * bits / 32) int32: all bits of a row one after another, the lowest first."""
    rows = np.unpackbits(codes[..., None].astype(np.uint8), axis=-1, count=bits, bitorder="little")
    return np.packbits(rows.reshape(len(codes), -1), axis=-1, bitorder="little").view(np.int32)


def interleave(codes: np.ndarray) -> np.ndarray:
    """AWQ: (K, N) codes -> (K, N / 8) int32."""
    order = codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return stream(order.reshape(len(codes), -1), 4)


def draw_affine(bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes (K, N), zeros and scales (K / group, N), values (N, K) in float32."""
    codes = RNG.integers(0, 1 << bits, (COLS, ROWS), np.uint8)
    zeros = RNG.integers(1, 1 << bits, (COLS // group, ROWS), np.uint8)
    scales = RNG.standard_normal((COLS // group, ROWS)).astype(np.float16)
    wide = codes.astype(np.float32) - np.repeat(zeros, group, axis=0)
    return codes, zeros, scales, np.ascontiguousarray((wide * np.repeat(scales, group, axis=0).astype(np.float32)).T)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_stream_of_bits_is_read_from_its_start(bits: int) -> None:
    codes = RNG.integers(0, 1 << bits, (5, 96), np.uint8)
    np.testing.assert_array_equal(unpack_bits(stream(codes, bits), bits, 96), codes)
    np.testing.assert_array_equal(unpack_bits(stream(codes, bits), bits, 37), codes[:, :37])


# -- AWQ and GPTQ ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "label"), [(32, "g32"), (64, "g64"), (128, "g128"), (COLS, "channel")])
def test_awq(tmp_path: Path, group: int, label: str) -> None:
    codes, zeros, scales, values = draw_affine(4, group)
    tensors = {"a.qweight": interleave(codes), "a.qzeros": interleave(zeros), "a.scales": scales}
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    check(assemble(tmp_path, settings, tensors)["a.weight"], f"awq-4bit-{label}", values)


def test_awq_s_other_layout_is_refused(tmp_path: Path) -> None:
    codes, zeros, scales, _ = draw_affine(4, 128)
    tensors = {"a.qweight": interleave(codes), "a.qzeros": interleave(zeros), "a.scales": scales}
    with pytest.raises(UnsupportedModelError, match=r"version is 'gemv', .*known: gemm: quantize it again"):
        assemble(tmp_path, {"quant_method": "awq", "bits": 4, "version": "gemv"}, tensors)


def make_gptq(bits: int, group: int, is_v2: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    codes, zeros, scales, values = draw_affine(bits, group)
    tensors = {
        "a.qweight": stream(codes.T, bits).T,
        "a.qzeros": stream(zeros if is_v2 else zeros - 1, bits),
        "a.scales": scales,
        "a.g_idx": np.arange(COLS, dtype=np.int32) // group,
    }
    return tensors, values


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (4, COLS), (8, 128), (2, 64), (3, 128)])
def test_gptq(tmp_path: Path, bits: int, group: int, is_v2: bool) -> None:
    tensors, values = make_gptq(bits, group, is_v2)
    settings: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": True}
    if is_v2:
        settings["checkpoint_format"] = "gptq_v2"
    name = f"gptq-{bits}bit-{'channel' if group == COLS else f'g{group}'}"
    check(assemble(tmp_path, settings, tensors)["a.weight"], name, values)


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_gptq_has_no_minimums(tmp_path: Path, bits: int) -> None:
    tensors, _ = make_gptq(bits, 128, False)
    zeros = np.full((COLS // 128, ROWS), (1 << bits - 1) - 1, np.uint8)
    matrix = assemble(tmp_path, {"quant_method": "gptq"}, tensors | {"a.qzeros": stream(zeros, bits)})[
        "a.weight"
    ].read()
    assert isinstance(matrix, QuantizedMatrix)
    assert matrix.minimum is None


def test_gptq_in_activation_order_is_refused_with_the_remedy(tmp_path: Path) -> None:
    tensors, _ = make_gptq(4, 128, False)
    tensors["a.g_idx"] = RNG.permutation(tensors["a.g_idx"])
    with pytest.raises(UnsupportedModelError, match=r"a was quantized in activation order \(desc_act, .*AWQ, GGUF"):
        assemble(tmp_path, {"quant_method": "gptq", "desc_act": True}, tensors)


def test_auto_round_s_files_are_read_as_what_they_are(tmp_path: Path) -> None:
    tensors, values = make_gptq(4, 128, False)
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    check(assemble(tmp_path, settings, tensors)["a.weight"], "gptq-4bit-g128", values)


def test_codes_are_unpacked_only_for_the_rows_that_are_read(tmp_path: Path) -> None:
    """However rows are selected and stacked before: as in gate_up, whose rows alternate."""
    made = [make_gptq(4, 64, False) for _ in range(2)]
    matrices = [
        assemble(tmp_path / str(i), {"quant_method": "gptq"}, tensors)["a.weight"].read()
        for i, (tensors, _) in enumerate(made)
    ]
    (both,) = stack_rows(matrices)
    assert isinstance(both, QuantizedMatrix)
    assert isinstance(both.codes, LazyCodes)
    order = RNG.permutation(2 * ROWS)[:40]
    values = np.concatenate([values for _, values in made])[order]
    np.testing.assert_array_equal(to_float32(both.rows(order)), values)
    np.testing.assert_array_equal(to_float32(both.rows(order).rows(slice(8, 40)).rows(slice(8))), values[8:16])


# -- FP8 ---------------------------------------------------------------------------------------------------------------


def draw_fp8(rows: int = ROWS, cols: int = COLS) -> np.ndarray:
    return RNG.standard_normal((rows, cols)).astype(float8_e4m3fn)


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
def test_fp8_in_blocks_that_the_matrix_does_not_fill(tmp_path: Path, dtype: Any) -> None:
    weight = draw_fp8(200, 320)
    scale = RNG.uniform(0.01, 1, (2, 3)).astype(dtype)
    whole = np.repeat(np.repeat(scale.astype(np.float32), 128, 0), 128, 1)[:200, :320]
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    stored = assemble(tmp_path, settings, {"a.weight": weight, "a.weight_scale_inv": scale})["a.weight"]
    assert check(stored, "fp8-block128", weight.astype(np.float32) * whole).format.group == 64  # 320 is no 3 x 128


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"])
@pytest.mark.parametrize(
    ("shape", "label"), [((), "tensor"), ((1,), "tensor"), ((ROWS, 1), "channel"), ((ROWS,), "channel")]
)
def test_fp8_of_rows_and_tensors(tmp_path: Path, method: str, shape: tuple[int, ...], label: str) -> None:
    weight, scale = draw_fp8(), np.asarray(RNG.uniform(0.01, 1, shape), np.float32)
    stored = assemble(tmp_path, {"quant_method": method}, {"a.weight": weight, "a.weight_scale": scale})["a.weight"]
    check(stored, f"fp8-{label}", weight.astype(np.float32) * scale.reshape(-1, 1))


def test_the_other_float8_is_converted(tmp_path: Path) -> None:
    weight, scale = RNG.standard_normal((ROWS, COLS)).astype(float8_e5m2), float32([[0.5]])
    stored = assemble(tmp_path, {"quant_method": "fp8"}, {"a.weight": weight, "a.weight_scale": scale})["a.weight"]
    assert (stored.format_name, stored.is_converted) == ("fp8-e5m2-tensor", True)
    np.testing.assert_array_equal(stored.read(), (weight.astype(np.float32) * 0.5).astype(np.float16))


def test_blocks_of_another_size_are_named(tmp_path: Path) -> None:
    tensors = {"a.weight": draw_fp8(), "a.weight_scale_inv": np.ones((2, 4), np.float32)}
    with pytest.raises(WeightMismatchError, match=r"weight_scale_inv has shape \(2, 4\), but a weight of \(64, 256\)"):
        assemble(tmp_path, {"quant_method": "fp8"}, tensors)


# -- NVFP4 of ModelOpt -------------------------------------------------------------------------------------------------


def test_nvfp4_of_modelopt_beside_its_fp8(tmp_path: Path) -> None:
    codes = RNG.integers(0, 16, (ROWS, COLS), np.uint8)
    scale = RNG.uniform(1, 400, (ROWS, COLS // 16)).astype(float8_e4m3fn)
    tensors = {
        "a.weight": stream(codes, 4).view(np.uint8),
        "a.weight_scale": scale,
        "a.weight_scale_2": float32(0.003),
        "b.weight": draw_fp8(),
        "b.weight_scale": float32(0.1),
    }
    factors = np.repeat(scale.astype(np.float32) * np.float32(0.003), 16, axis=1)
    found = assemble(tmp_path, {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, tensors)
    check(found["a.weight"], "nvfp4", float32(E2M1)[codes] * factors)
    assert found["b.weight"].format_name == "fp8-tensor"


# -- what all formats share --------------------------------------------------------------------------------------------


def test_scales_of_activations_are_left_out_with_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"a.weight": draw_fp8(), "a.weight_scale": float32([1]), "a.input_scale": float32([1])}
    with caplog.at_level(logging.INFO):
        found = assemble(tmp_path, {"quant_method": "fp8"}, tensors | {"attn.k_scale": float32([1])})
    assert sorted(found) == ["a.weight"]
    assert "activations keep their precision; 2 scales of them are not used" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}},
    ],
)
def test_activations_that_were_meant_to_be_quantized_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    with caplog.at_level(logging.INFO):
        assemble(tmp_path, settings, {"a.weight": draw_fp8(), "a.weight_scale": float32([1])})
    assert "activations keep their precision" in caplog.text


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "a.weight", r"format is 'sparse-24-bitmask', .*dense"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "a.weight", r"transform_config is .*rotations"),
        ({"quant_method": "modelopt"}, "a.pre_quant_scale", r"a\.pre_quant_scale, \(4,\), scales the inputs"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, settings: dict[str, Any], name: str, message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        assemble(tmp_path, {"quant_method": "compressed-tensors"} | settings, {name: float32([1, 1, 1, 1])})


def test_modules_that_were_left_out_stay_as_they_are(tmp_path: Path) -> None:
    codes, zeros, scales, _ = draw_affine(4, 128)
    tensors = {"a.qweight": interleave(codes), "a.qzeros": interleave(zeros), "a.scales": scales}
    head = RNG.standard_normal((8, 32)).astype(np.float16)
    settings = {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["lm_head"]}
    found = assemble(tmp_path, settings, tensors | {"lm_head.weight": head})
    assert {name: tensor.format_name for name, tensor in found.items()} == {
        "a.weight": "awq-4bit-g128",
        "lm_head.weight": "float16",
    }


def test_unknown_methods_are_refused_with_the_known(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"quant_method is 'hqq', .*known: mlx, fp8, .*GGUF"):
        assemble(tmp_path, {"quant_method": "hqq"}, {"a.weight": np.ones((2, 2), np.float32)})
    assert {"gptq", "awq", "compressed-tensors", "modelopt", "bitsandbytes"} < set(METHODS)


def test_int8_of_bitsandbytes_is_refused_by_name(tmp_path: Path) -> None:
    weight, scale = np.zeros((ROWS, COLS), np.int8), np.ones(ROWS, np.float32)
    tensors: dict[str, np.ndarray] = {"a.weight": weight, "a.SCB": scale}
    with pytest.raises(UnsupportedModelError, match=r"a is in the int8 of bitsandbytes, .*take the model's"):
        assemble(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors)


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "gptq-4bit-g128"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq-4bit-g128"),
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "FP8"}}, "fp8-tensor"),
    ],
)
def test_settings_in_files_of_their_own(tmp_path: Path, file: str, content: dict[str, Any], name: str) -> None:
    codes, zeros, scales, _ = draw_affine(4, 128)
    by_method: dict[str, dict[str, np.ndarray]] = {
        "gptq": make_gptq(4, 128, False)[0],
        "awq": {"a.qweight": interleave(codes), "a.qzeros": interleave(zeros), "a.scales": scales},
        "fp8": {"a.weight": draw_fp8(), "a.weight_scale": float32(1)},
    }
    tensors = by_method[name.partition("-")[0]]
    save_file({key: np.ascontiguousarray(values) for key, values in tensors.items()}, tmp_path / "model.safetensors")
    write_json(tmp_path / file, content)
    assert assemble_matrices(tmp_path, read_safetensors(tmp_path))["a.weight"].format_name == name
