"""Llama and Qwen3 through the CPU's kernels against an implementation in NumPy: no pages, no packing, no fusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
from tests.builders import (
    LLAMA3_SCALING,
    WIDE,
    GGUFTweaks,
    TinyLlama,
    make_weights,
    rope_divisors,
    write_tiny_gguf,
    write_tiny_hf_llama,
)
from tests.ops.builders import Piece, make_step
from tests.sweeps import swept
from tinyvllm.arrays import to_float32
from tinyvllm.config import ModelFiles
from tinyvllm.device.handle import open_device
from tinyvllm.errors import WeightMismatchError
from tinyvllm.model.llama import Llama
from tinyvllm.model.registry import complete_config, find_family
from tinyvllm.model.weights.checkpoint import open_checkpoint
from tinyvllm.ops.backend import Backend, Step, pool_groups
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.storage.model_config import read_model_config

Weights = Mapping[str, np.ndarray]
PROMPT = [3, 141, 59, 26, 5, 35, 89, 79, 32, 38, 46, 2, 250]
BLOCK_SIZE = 8


# -- the implementation in NumPy -------------------------------------------------------------------------------------


def numpy_llama(model: TinyLlama, weights: Weights, token_ids: list[int]) -> np.ndarray:
    """Logits of every position, (T, V), float64."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    x = w["model.embed_tokens.weight"][token_ids]
    for index in range(model.layers):
        names = (*LAYER_NAMES, *HEAD_NORMS) if model.norms_heads else LAYER_NAMES
        layer = {name: w[f"model.layers.{index}.{name}.weight"] for name in names}
        h = rms_norm(x, layer["input_layernorm"], model.norm_eps)
        x = x + attention(model, layer, h) @ layer["self_attn.o_proj"].T
        h = rms_norm(x, layer["post_attention_layernorm"], model.norm_eps)
        gate = h @ layer["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["mlp.up_proj"].T)) @ layer["mlp.down_proj"].T
    head = w["model.embed_tokens.weight"] if model.tie else w["lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], model.norm_eps) @ head.T


LAYER_NAMES = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def attention(model: TinyLlama, layer: Weights, h: np.ndarray) -> np.ndarray:
    """Causal attention over the whole sequence, (T, H * D)."""
    tokens = len(h)
    q, k, v = (
        (h @ layer[f"self_attn.{name}_proj"].T).reshape(tokens, heads, model.head_dim)
        for name, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads))
    )
    if model.norms_heads:
        q, k = (rms_norm(x, layer[name], model.norm_eps) for x, name in zip((q, k), HEAD_NORMS, strict=True))
    angles = np.arange(tokens)[:, None] * frequencies(model)
    q, k = rotate(q, angles), rotate(k, angles)
    out = np.empty_like(q)
    for head in range(model.heads):
        kv_head = head * model.kv_heads // model.heads
        scores = q[:, head] @ k[:, kv_head].T / math.sqrt(model.head_dim)
        scores[np.triu_indices(tokens, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, kv_head]
    return out.reshape(tokens, -1)


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def frequencies(model: TinyLlama) -> np.ndarray:
    plain = 1 / model.rope_theta ** (np.arange(0, model.head_dim, 2) / model.head_dim)
    scaling = model.rope_scaling
    if scaling is None:
        return plain
    return plain / (rope_divisors(model) if scaling["rope_type"] == "llama3" else scaling["factor"])


# -- the model under test --------------------------------------------------------------------------------------------


def load(files: ModelFiles, make: Callable[..., Backend] = lambda device: CpuBackend(device, None)) -> Any:
    config = read_model_config(files)
    return find_family(config)(
        complete_config(config), open_checkpoint(files, config), make(open_device()), num_positions=64
    )


def run(model: Llama, token_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits (V,) after all tokens but the last by one prefill step, and after all by a decode step."""
    ops = model.backend
    pool = ops.make_pool(pool_groups(model.config.layers), 5, BLOCK_SIZE, "float32")
    start = len(token_ids) - 1
    # the same block table in both steps: make_step draws it from the seed
    steps = ((StepLayout(16, 1, 4, BLOCK_SIZE), Piece(0, start)), (StepLayout(1, 1, 4, BLOCK_SIZE), Piece(start)))
    rows = []
    for layout, piece in steps:
        buffer = make_step(layout, [piece])
        layout.views(buffer)["token_ids"][: piece.count] = token_ids[piece.start : piece.start + piece.count]
        is_decode = layout.num_tokens == 1
        logits = model(Step(layout, ops.device.upload(buffer), pool, is_decode)).numpy()
        rows.append(logits.reshape(1, model.logit_stride)[0, : model.config.vocab_size])
    return rows[0], rows[1]


def check(model: Llama, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    for got, wanted in zip(run(model, PROMPT), expected[-2:], strict=True):
        difference = np.abs(got - wanted).max()
        print(f"largest difference {difference:.1e}")
        assert difference < tolerance


def weights_of(files: ModelFiles, numbers: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The file's own values, quantized as they are."""
    checkpoint = open_checkpoint(files, read_model_config(files))
    shapes = {name: weight.shape for name, weight in make_weights(TinyLlama(**numbers)).items()}
    return {name: to_float32(checkpoint.take(name, shape)) for name, shape in shapes.items()}


SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie": False, "kv_heads": 4, "seed": 1},  # an own head, no grouping
    # H * D is not hidden
    "wide heads": {"heads": 6, "kv_heads": 2, "hidden": 64, "head_dim": 32, "ffn": 160, "seed": 2},
    "llama3 rope": {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen3": {"family": "qwen3", "head_dim": 32, "norm_eps": 1e-6, "rope_theta": 1e6},  # H * D is twice hidden
    "qwen3 untied": {"family": "qwen3", "tie": False, "seed": 4},
    "heads of 40": {"heads": 4, "kv_heads": 2, "head_dim": 40, "seed": 5},  # 320 rows of q, k and v, 80 of k
    "3 KV heads": {"family": "qwen3", "heads": 6, "kv_heads": 3, "head_dim": 16, "seed": 6},  # 192 rows, 48 of k
    "a part of a panel": {"heads": 4, "kv_heads": 1, "head_dim": 24, "seed": 7},  # 144 rows, which no panels hold
}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_the_plain_reference_equal_the_implementation_in_numpy(tmp_path: Path, name: str) -> None:
    tiny = TinyLlama(**SHAPES[name])
    model = load(write_tiny_hf_llama(tmp_path, **SHAPES[name]), ReferenceBackend)
    check(model, numpy_llama(tiny, make_weights(tiny), PROMPT))


@pytest.mark.parametrize("name", swept(SHAPES, []))  # by default: engines, and tests/ops/test_linear.py for such rows
def test_logits_equal_the_implementation_in_numpy(tmp_path: Path, name: str) -> None:
    numbers = SHAPES[name]
    files = write_tiny_hf_llama(tmp_path, **numbers)
    tiny = TinyLlama(**numbers)
    check(load(files), numpy_llama(tiny, make_weights(tiny), PROMPT))


@pytest.mark.sweep  # tests/ops multiplies by such weights
@pytest.mark.parametrize(("dtype", "family"), [*product(("float16", "bfloat16"), ("llama", "qwen3"))])
def test_half_precision_checkpoints_are_computed_in_float32(tmp_path: Path, dtype: str, family: str) -> None:
    files, numbers = write_tiny_hf_llama(tmp_path, dtype=dtype, family=family), {"family": family}
    check(load(files), numpy_llama(TinyLlama(family=family), weights_of(files, numbers), PROMPT))


KINDS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "f32": ("F32", {}, {"rope_scaling": LLAMA3_SCALING}),
    "q4_1": ("Q4_1", {"token_embd": "Q8_0"}, {}),
    # as Q4_K_M mixes them
    "q4_k_m": ("Q4_K", {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}, WIDE),
    "all different": ("Q5_0", {"attn_q.": "Q4_0", "attn_v": "Q5_1"}, {"tie": False}),
    "qwen3 q4_k_m": (
        "Q4_K",
        {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"},
        WIDE | {"family": "qwen3"},
    ),
    "qwen3 all different": (
        "Q8_0",
        {"attn_k.": "Q4_0", "attn_v": "Q5_1"},
        {"tie": False, "family": "qwen3", "head_dim": 32},
    ),
}


@pytest.mark.sweep  # by default: two kinds in a model, by the reference, and all of them in tests/ops
@pytest.mark.parametrize("name", KINDS)
def test_quantized_gguf_equals_its_own_values_in_numpy(tmp_path: Path, name: str) -> None:
    quant, quant_of, numbers = KINDS[name]
    files = write_tiny_gguf(tmp_path / "tiny.gguf", quant=quant, tweaks=GGUFTweaks(quant_of=quant_of), **numbers)
    expected = numpy_llama(TinyLlama(**numbers), weights_of(files, numbers), PROMPT)
    check(load(files), expected)
    check(load(files, lambda device: CpuBackend(device, "float32", dequantize=True)), expected)


@pytest.mark.parametrize("family", swept(("llama", "qwen3"), ["llama"]))
def test_both_formats_give_the_same_logits(tmp_path: Path, family: str) -> None:
    hf = load(write_tiny_hf_llama(tmp_path / "hf", seed=3, family=family), ReferenceBackend)
    gguf = load(write_tiny_gguf(tmp_path / "tiny.gguf", quant="F32", seed=3, family=family), ReferenceBackend)
    for a, b in zip(run(hf, PROMPT), run(gguf, PROMPT), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("family", swept(("llama", "qwen3"), ["llama"]))
def test_the_reference_backend_runs_the_same_model(tmp_path: Path, family: str) -> None:
    tweaks, numbers = GGUFTweaks(quant_of={"attn_v": "Q8_0"}), {"family": family}
    files = write_tiny_gguf(tmp_path / "tiny.gguf", quant="Q4_1", tweaks=tweaks, family=family)
    expected = numpy_llama(TinyLlama(family=family), weights_of(files, numbers), PROMPT)
    check(load(files, ReferenceBackend), expected, tolerance=1e-5)


@pytest.mark.sweep  # by default: tests/ops/test_linear.py pads such rows, of one format and of two
def test_keys_that_fill_no_panel_may_have_another_format_than_values(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"heads": 4, "kv_heads": 1, "head_dim": 40}  # 200 rows of q and k, 40 of v
    tweaks = GGUFTweaks(quant_of={"attn_v": "Q8_0"})
    files = write_tiny_gguf(tmp_path / "tiny.gguf", quant="Q4_1", tweaks=tweaks, **numbers)
    expected = numpy_llama(TinyLlama(**numbers), weights_of(files, numbers), PROMPT)
    check(load(files), expected, tolerance=3e-3)  # float16 holds all three


def test_loading_reports_its_progress_to_the_end(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path)
    config = read_model_config(files)
    seen: list[tuple[int, int]] = []
    backend = CpuBackend(open_device(), None)
    Llama(config, open_checkpoint(files, config), backend, 8, lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("numbers", [{}, {"family": "qwen3"}], ids=["llama", "qwen3"])
def test_norms_of_heads_belong_to_their_family(tmp_path: Path, numbers: dict[str, str]) -> None:
    """Neither may Qwen3 lack them, nor llama have them unread."""
    if numbers:
        tweaks = GGUFTweaks(drop=("blk.1.attn_k_norm.weight",))
    else:
        tweaks = GGUFTweaks(extra={"blk.1.attn_k_norm.weight": np.ones(16, np.float32)})
    files = write_tiny_gguf(tmp_path / "tiny.gguf", tweaks=tweaks, **numbers)
    with pytest.raises(WeightMismatchError, match=r"model\.layers\.1\.self_attn\.k_norm\.weight"):
        load(files)


def test_a_surplus_tensor_is_named(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sub_norm.weight": np.ones(64, np.float32)}
    files = write_tiny_gguf(tmp_path / "tiny.gguf", tweaks=GGUFTweaks(extra=extra))
    with pytest.raises(WeightMismatchError, match=r"does not use: blk\.0\.attn_sub_norm\.weight"):
        load(files)
