"""An adapter's matrices, read from its safetensors file and checked against the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from tinyvllm.arrays import to_float32
from tinyvllm.config import ModelConfig
from tinyvllm.errors import UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.safetensors import read_file
from tinyvllm.model.weights.stored import DENSE_DTYPES, DENSE_NAMES, StoredTensor
from tinyvllm.storage import families
from tinyvllm.storage.adapter_config import AdapterConfig, digest_of, read_adapter_config
from tinyvllm.storage.regular_file import shortened
from tinyvllm.storage.values import MAX_LAYERS

# peft's names: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight; mlx-lm's:
# model.layers.0.self_attn.q_proj.lora_a
TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?:model\.|language_model\.|text_model\.)*layers\.(?P<layer>\d{1,6})\.(?P<module>[\w.]+?)"
    r"\.lora_(?P<half>[ABab])(?:\.default)?(?P<suffix>\.weight)?"
)
LARGEST = 65504.0  # of float16, in which GPUs hold the matrices


@dataclass(frozen=True)
class Module:
    """A linear layer of the model: its name, and its size."""

    name: str
    num_rows: int
    num_cols: int


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a module: b (rows, r) times a (r, columns), float32; b is scaled."""

    a: np.ndarray
    b: np.ndarray


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter, by the modules that it changes."""

    digest: str  # of its files
    rank: int  # the largest of its modules
    modules: Mapping[str, LowRank]
    base_model: str

    @property
    def nbytes(self) -> int:
        return sum(module.a.nbytes + module.b.nbytes for module in self.modules.values())


def read_adapter(directory: Path, modules: Mapping[str, Module], model: ModelConfig, max_rank: int) -> AdapterWeights:
    """Read the adapter in a directory. modules: those that an adapter may change, by name.

    Raises ModelError, UnsupportedModelError and WeightMismatchError, which name the file, the tensor, and its shape or
    rank."""
    config = read_adapter_config(directory)
    reader = _Reader(config, modules, model, max_rank)
    found = reader.read(read_file(directory, config.weights))
    return AdapterWeights(digest_of(config), max(len(module.a) for module in found.values()), found, config.base_model)


class _Reader:
    """Reads the tensors of one adapter."""

    def __init__(self, config: AdapterConfig, modules: Mapping[str, Module], model: ModelConfig, max_rank: int) -> None:
        self._config, self._modules, self._model, self._max_rank = config, modules, model, max_rank
        family = families.KNOWN_ARCHITECTURES.get(model.architecture)
        self._fused = {} if family is None else family.fused
        self._renamed = {} if family is None else family.hf_layer_names
        self._path = config.weights

    def read(self, tensors: Mapping[str, StoredTensor]) -> dict[str, LowRank]:
        halves = self._pair(tensors)
        found: dict[str, LowRank] = {}
        for module, pair in halves.items():
            parts = self._parts(module, next(iter(pair.values())))
            if len(pair) != 2:
                (half,) = pair
                other = "B" if half == "A" else "A"
                self._refuse(f"tensor {pair[half]} has no lora_{other} beside it: the file is incomplete")
            found |= self._read_pair(module, parts, pair, tensors)
        if not found:
            self._refuse("it has no tensors of LoRA (lora_A, lora_B)")
        return found

    def _pair(self, tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, str]]:
        """The names of each module's tensors, by "A" and "B"."""
        halves: dict[str, dict[str, str]] = {}
        for name in tensors:
            match = TENSOR.fullmatch(name)
            is_mlx = match is not None and match["half"].islower()
            if match is None or is_mlx != self._config.is_mlx or (match["suffix"] is None) != is_mlx:
                self._refuse_name(name)
            if int(match["layer"]) >= min(MAX_LAYERS, self._model.num_layers):
                self._refuse(f"tensor {shortened(name)}: the model has only {self._model.num_layers} layers")
            inner = self._renamed.get(match["module"], match["module"])
            pair = halves.setdefault(f"model.layers.{match['layer']}.{inner}", {})
            if pair.setdefault(match["half"].upper(), name) != name:
                self._refuse(f"tensors {pair[match['half'].upper()]} and {name} are of the same module")
        return halves

    def _read_pair(
        self, module: str, parts: list[Module], pair: Mapping[str, str], tensors: Mapping[str, StoredTensor]
    ) -> dict[str, LowRank]:
        """A module's matrices; of a module that the engine splits (Phi's qkv_proj), those of its parts."""
        rows, cols = sum(part.num_rows for part in parts), parts[0].num_cols
        a, b = (self._values(pair[half], tensors[pair[half]]) for half in "AB")
        if self._config.is_mlx:
            a, b = a.T, b.T
        self._check_shapes(module, pair, (a, b), (rows, cols))
        b = b * np.float32(self._config.scale_of(module))
        if not (np.abs(a) <= LARGEST).all():
            self._refuse(f"tensor {pair['A']} has values beyond {LARGEST:g}")
        if not (np.abs(b) <= LARGEST).all():
            self._refuse(f"tensor {pair['B']}, scaled, has values beyond {LARGEST:g}")
        found, start = {}, 0
        for part in parts:
            found[part.name] = LowRank(a, b[start : start + part.num_rows])
            start += part.num_rows
        return found

    def _parts(self, module: str, tensor: str) -> list[Module]:
        """The model's modules that a module of the adapter stands for."""
        prefix, inner = module.split(".", 3)[:3], module.split(".", 3)[3]
        names = [".".join([*prefix, part]) for part in self._fused.get(inner, (inner,))]
        if missing := [name for name in names if name not in self._modules]:
            self._refuse_module(missing[0], tensor)
        return [self._modules[name] for name in names]

    def _check_shapes(
        self,
        module: str,
        pair: Mapping[str, str],
        matrices: tuple[np.ndarray, np.ndarray],
        size: tuple[int, int],
    ) -> None:
        (a, b), (rows, cols), is_mlx = matrices, size, self._config.is_mlx
        rank = self._config.rank_of(module)

        def shape(matrix: np.ndarray) -> tuple[int, ...]:
            return matrix.shape[::-1] if is_mlx else matrix.shape

        for name, matrix, wanted in ((pair["A"], a, (rank, cols)), (pair["B"], b, (rows, rank))):
            if matrix.shape != wanted:
                stored = wanted[::-1] if is_mlx else wanted
                self._refuse(
                    f"tensor {name} has shape {shape(matrix)}, but for rank {rank} and the model's {rows} x {cols} "
                    f"matrix it must be {stored}: the adapter is of another model, or {self._config.source.name} of "
                    "another adapter"
                )
        if rank > self._max_rank:
            self._refuse(f"tensor {pair['A']} has rank {rank}, but --max-lora-rank is {self._max_rank}: raise it")

    def _values(self, name: str, tensor: StoredTensor) -> np.ndarray:
        if tensor.format_name not in DENSE_NAMES.values():
            raise UnsupportedModelError(
                f"{self._path}: tensor {name} has type {tensor.format_name}, which is not supported; known: "
                f"{', '.join(DENSE_DTYPES)}"
            )
        if len(tensor.shape) != 2 or not all(tensor.shape):
            self._refuse(f"tensor {name} has shape {tensor.shape}, but must be a matrix")
        values = np.asarray(to_float32(tensor.read()), np.float32)
        if not np.isfinite(values).all():
            self._refuse(f"tensor {name} has values that are not finite")
        return values

    def _refuse(self, fault: str) -> NoReturn:
        raise WeightMismatchError(f"{self._path}: {fault}")

    def _refuse_name(self, name: str) -> NoReturn:
        what = "of no low-rank matrix of a layer"
        if "lora_magnitude_vector" in name:
            what = "of DoRA"
        elif "lora_embedding" in name:
            what = "of the embeddings"
        raise UnsupportedModelError(
            f"{self._path}: tensor {shortened(name)} is {what}, which is not supported; supported are lora_A and "
            f"lora_B of {self._known()} in layers"
        )

    def _refuse_module(self, module: str, tensor: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{self._path}: tensor {shortened(tensor)} changes {shortened(module)}, where this model takes no "
            f"adapters; supported are {self._known()}"
        )

    def _known(self) -> str:
        return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in self._modules)) or "no modules of this model"
