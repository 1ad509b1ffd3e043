"""Every format of directories in a whole engine on the CPU: the greedy tokens of the same model with dense weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import TinyLlama, make_weights, write_tiny_hf_llama
from tests.model.weights.hf_formats.directory import assemble
from tests.model.weights.hf_formats.test_compressed import BNB_SETTINGS, SETTINGS
from tests.model.weights.hf_formats.test_layouts import draw_affine, interleave, make_gptq
from tests.model.weights.hf_formats.write_compressed import DATA as COMPRESSED
from tests.model.weights.hf_formats.write_mlx import CASES as MLX_CASES
from tests.model.weights.hf_formats.write_mlx import DATA as MLX
from tests.ops.formats.drawn import draw_matrix
from tinyvllm import LLM, SamplingParams
from tinyvllm.arrays import Format, HostMatrix, QuantizedMatrix, Scales, to_float32
from tinyvllm.execution import runner

WIDTH = 128  # of every matrix: whole groups of each format
NUM_LAYERS = 2
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 16,
    "num_gpu_blocks_override": 9,
    "block_size": 8,
    "decode_buckets": (1,),
    "token_buckets": (16,),
}
SIZES: dict[str, Any] = {
    "layers": NUM_LAYERS,
    "hidden": WIDTH,
    "ffn": WIDTH,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "tie": False,
}
# Matrices of a layer, each of a format of its own (the up projection has the gate's)
MODULES = (*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.down_proj")
FROM_MLX = ("affine3_g64", "affine4_g64", "affine8_g32")
FROM_COMPRESSED_TENSORS = tuple(
    f"{name}." for name in ("w4_g128_zeros", "w8_g128", "int8_channel_zeros", "fp8_block", "mxfp8", "nvfp4")
)


def read_formats(directory: Path) -> Iterator[Format]:
    """The formats that the readers give."""
    codes, zeros, scales, _ = draw_affine(4, 128)
    awq = {"awq.qweight": interleave(codes), "awq.qzeros": interleave(zeros), "awq.scales": scales}
    sources = [
        assemble(directory / "mlx", MLX_CASES, MLX, FROM_MLX),
        assemble(directory / "compressed", SETTINGS, COMPRESSED, FROM_COMPRESSED_TENSORS),
        assemble(directory / "bnb", BNB_SETTINGS, COMPRESSED, ("nf4_nested.",)),
        assemble(directory / "awq", {"quant_method": "awq"}, awq),
        assemble(directory / "gptq", {"quant_method": "gptq"}, make_gptq(8, 128, False)[0]),
    ]
    for tensors in sources:
        for name, tensor in tensors.items():
            matrix = tensor.read() if name.endswith(".weight") else None
            if isinstance(matrix, QuantizedMatrix):
                yield matrix.format


def draw(fmt: Format, rows: int, seed: int) -> QuantizedMatrix:
    """A matrix that keeps its input's spread."""
    matrix = draw_matrix(fmt, rows, WIDTH, seed)
    factor = np.exp2(np.rint(np.log2(WIDTH**-0.5 / to_float32(matrix).std()))).astype(np.float32)

    def spread(scales: Scales) -> Scales:
        return replace(scales, base=(scales.base.astype(np.float32) * factor).astype(scales.base.dtype))

    return replace(matrix, scale=spread(matrix.scale), minimum=matrix.minimum and spread(matrix.minimum))


class Mixed:
    """A model's weights, whose matrices in layers are of many formats, packed or not."""

    has_head = True

    def __init__(self, formats: list[Format], is_packed: bool) -> None:
        self._formats, self._is_packed = formats, is_packed
        self._weights = make_weights(TinyLlama(**SIZES))
        self.names: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> HostMatrix:
        layer, module = name.split(".")[2:3], name.removesuffix(".weight").replace("up_proj", "gate_proj")
        found = [i for i, end in enumerate(MODULES) if module.endswith(end)]
        if not found:
            return self._weights[name]
        fmt = self._formats[(int(layer[0]) * len(MODULES) + found[0]) % len(self._formats)]
        self.names.add(fmt.name)
        assert shape[1] == WIDTH
        matrix = draw(fmt, shape[0], seed=len(name))
        return matrix if self._is_packed else to_float32(matrix)

    def finish(self) -> None:
        """Nothing is left over."""


def generate(files: Path, source: Mixed, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(runner, "open_checkpoint", lambda *_: source)
    monkeypatch.setattr(runner, "require_tensors", lambda *_: None)  # the source has no headers
    llm = LLM(str(files), **ENGINE)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    (choice,) = llm.generate("two are company, three", params)[0].outputs
    llm.close()
    return list(choice.token_ids)


def test_greedy_tokens_are_those_of_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = list(read_formats(tmp_path / "parts"))
    assert len(formats) <= NUM_LAYERS * len(MODULES), "some formats would not be used"
    files = write_tiny_hf_llama(tmp_path / "tiny", **SIZES)
    packed = Mixed(formats, is_packed=True)
    tokens = generate(files.path, packed, monkeypatch)
    assert packed.names == {fmt.name for fmt in formats}
    assert len(set(tokens)) > 3
    assert tokens == generate(files.path, Mixed(formats, is_packed=False), monkeypatch)
