"""Every format of directories in a model on the CPU: the logits of the same model with dense weights, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.builders import TinyLlama, make_weights, write_tiny_hf_llama
from tests.model.weights.hf_formats.directory import assemble
from tests.model.weights.hf_formats.test_compressed import BNB_SETTINGS, SETTINGS
from tests.model.weights.hf_formats.test_layouts import draw_affine, interleave, make_gptq
from tests.model.weights.hf_formats.write_compressed import DATA as COMPRESSED
from tests.model.weights.hf_formats.write_mlx import CASES as MLX_CASES
from tests.model.weights.hf_formats.write_mlx import DATA as MLX
from tests.ops.builders import Piece, largest_difference, make_step
from tests.ops.formats.drawn import draw_matrix
from tinyvllm.arrays import Format, HostMatrix, QuantizedMatrix, Scales, to_float32
from tinyvllm.config import ModelConfig
from tinyvllm.device.handle import open_device
from tinyvllm.model.registry import complete_config, make_model
from tinyvllm.ops.backend import Backend, Step
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.storage.model_config import read_model_config

WIDTH = 128  # of every matrix: whole groups of each format
NUM_LAYERS = 2
PROMPT = b"two are company, three"
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


def next_logits(source: Mixed, config: ModelConfig, ops: Backend) -> np.ndarray:
    """Of the token after the prompt."""
    model = make_model(complete_config(config), source, ops, 64, lambda done, total: None)
    layout = StepLayout(32, 1, 8, 8)
    buffer = make_step(layout, [Piece(0, len(PROMPT))])
    layout.views(buffer)["token_ids"][: len(PROMPT)] = list(PROMPT)
    pool = ops.make_pool(model.pool_groups, 9, layout.block_size, "float32")
    logits: np.ndarray = model(Step(layout, ops.device.upload(buffer), pool, is_decode=False)).numpy()
    return logits[: config.vocab_size]


def test_logits_are_those_of_the_dense_model(tmp_path: Path) -> None:
    formats = list(read_formats(tmp_path / "parts"))
    assert len(formats) <= NUM_LAYERS * len(MODULES), "some formats would not be used"
    config = replace(read_model_config(write_tiny_hf_llama(tmp_path / "tiny", **SIZES)), tie_embeddings=False)
    device, packed = open_device(1), Mixed(formats, is_packed=True)
    found = next_logits(packed, config, CpuBackend(device, None))
    assert packed.names == {fmt.name for fmt in formats}
    expected = next_logits(Mixed(formats, is_packed=False), config, ReferenceBackend(device))
    assert largest_difference(found, expected) < 1e-4
