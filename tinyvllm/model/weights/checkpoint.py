"""A model's weights, taken tensor by tensor by the family's own names; strict about what is missing or left over."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from tinyvllm.arrays import HostMatrix
from tinyvllm.config import ModelConfig, ModelFiles
from tinyvllm.errors import ModelError, UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.experts import stack_experts
from tinyvllm.model.weights.fused import split_fused
from tinyvllm.model.weights.gguf import read_gguf
from tinyvllm.model.weights.hf_formats import assemble_matrices
from tinyvllm.model.weights.latents import split_latents
from tinyvllm.model.weights.names import HEAD_NAME, tied, unwrapped, with_drafting, with_model
from tinyvllm.model.weights.recurrent import from_hf
from tinyvllm.model.weights.safetensors import RAW_DTYPES, read_safetensors
from tinyvllm.model.weights.stored import DENSE_DTYPES, DENSE_NAMES, StoredTensor
from tinyvllm.storage import families

logger = logging.getLogger(__name__)

LAYER_TENSOR = re.compile(r"(?P<layer>model\.layers\.\d+\.)(?P<module>.+?)(?P<suffix>\.\w+)")
DRAFTING = "mtp"  # multi-token prediction: a part of its own in Hugging Face's files

# Buffers that old versions of transformers saved; the model computes them
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "position_ids")
# Ends of the names of codes, which are left as they are if nothing says how they are packed
PACKED_SUFFIXES = ("_blocks", ".qweight", ".weight_packed")


def open_checkpoint(files: ModelFiles, config: ModelConfig) -> Checkpoint:
    """Find every tensor of the model, without reading values. Raises ModelError and its subclasses."""
    family = families.KNOWN_ARCHITECTURES.get(config.architecture)
    if files.kind == "gguf":
        read = read_gguf(files.path, config)
    else:
        unread = () if family is None else family.hf_unread  # left out first: they may be of formats that are not known
        stored = unwrapped(read_safetensors(files.path))
        if config.has_drafting:
            stored = with_drafting(stored, config.num_layers)
        for line in unread_lines(stored, unread):
            logger.info("%s: %s", files.name, line)
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(unread)}
        read = with_model(language_model_tensors(assemble_matrices(files.path, stored), config.architecture))
        if config.state is not None:
            read = from_hf(files.path, read, config.state)
    if config.has_drafting and not any(name.startswith(f"model.layers.{config.num_layers}.mtp.") for name in read):
        raise ModelError(
            f"{files.path} has no layer that drafts tokens (mtp.* in Hugging Face's files, nextn.* in GGUF): choose "
            "another method in --speculative-config, or files that have kept the layer"
        )
    if family is not None and family.fused:
        read = split_fused(read, family.fused, config)
    alternate = family is not None and family.alternates_experts
    read = stack_experts(files.path, read, config, alternate=alternate)
    read = split_latents(read, config)
    read = {name: tensor for name, tensor in read.items() if not name.startswith(_unread_modules(config))}
    if config.tie_embeddings:
        read = tied(files.path, read)
    kept = {name: tensor for name, tensor in read.items() if not name.endswith(IGNORED_SUFFIXES)}
    checkpoint = Checkpoint(files.path, kept)
    for line in format_lines(checkpoint.tensors):
        logger.info("%s: %s", files.name, line)
    return checkpoint


def with_own_head(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The config, untied where the files have a head of other values than the embeddings."""
    return replace(config, tie_embeddings=False) if checkpoint.has_head else config


def unread_lines(tensors: Mapping[str, StoredTensor], unread: Sequence[str]) -> list[str]:
    """What is left out, by part: the beginnings of names in `unread`. One line for each part that the files have."""
    lines = []
    for prefix in unread:
        sizes = [tensor.num_bytes for name, tensor in tensors.items() if name.startswith(prefix)]
        if sizes:
            part = prefix.strip(".").rpartition(".")[2]
            why = "method mtp of --speculative-config is off" if part == DRAFTING else "this model runs text only"
            size = f"{len(sizes)} tensors, {sum(sizes) / 1e9:.1f} GB"
            lines.append(f"{part.replace('_', ' ')}: {size} not loaded: {why}")
    return lines


def format_lines(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Which matrices have which format, and what conversions at load cost."""
    modules: dict[str, dict[str, None]] = {}  # in the order of the files
    for name, tensor in tensors.items():
        if len(tensor.shape) > 1:
            parent, _, module = name.removesuffix(".weight").rpartition(".")
            module = f"experts.{module}" if parent.endswith(".experts") else module
            modules.setdefault(tensor.format_name, {})[module] = None
    lines = [f"{', '.join(names)}: {format_name}" for format_name, names in modules.items()]
    converted = [tensor for tensor in tensors.values() if tensor.is_converted]
    if converted:
        names = ", ".join(sorted({tensor.format_name for tensor in converted}))
        before = sum(tensor.num_bytes for tensor in converted) / 2**20
        after = sum(2 * math.prod(tensor.shape) for tensor in converted) / 2**20
        lines.append(
            f"{len(converted)} matrices in {names} are converted to float16, because no packed format here holds "
            f"them: they take {after:.0f} MiB instead of {before:.0f}"
        )
    return lines


def _unread_modules(config: ModelConfig) -> tuple[str, ...]:
    """Beginnings of the names of tensors that files have, but no layer uses: keys and values in layers that read
    another layer's, and the layers after the last, which draft tokens (GLM-4.7-Flash, DeepSeek V3)."""
    drafting = (f"model.layers.{config.num_layers}.",) if config.latent is not None else ()
    return drafting + tuple(
        f"model.layers.{layer}.self_attn.{module}."
        for layer, kind in enumerate(config.layers)
        if kind.kv_layer is not None
        for module in ("k_proj", "v_proj", "k_norm", "v_norm")
    )


def language_model_tensors(tensors: Mapping[str, StoredTensor], architecture: str) -> dict[str, StoredTensor]:
    """Tensors by the names that the text model alone would have, without those of other parts (a vision tower)."""
    family = families.KNOWN_ARCHITECTURES.get(architecture)
    if family is None:
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith(family.hf_unread):
            prefix = next((prefix for prefix in family.hf_renamed if name.startswith(prefix)), "")
            name = family.hf_renamed.get(prefix, "") + name.removeprefix(prefix)
            found[_layer_name(name, family.hf_layer_names)] = tensor
    return found


def _layer_name(name: str, names: Mapping[str, str]) -> str:
    """Our name of a layer's tensor, by those of its modules."""
    match = LAYER_TENSOR.fullmatch(name)
    if match is None or match["module"] not in names:
        return name
    return f"{match['layer']}{names[match['module']]}{match['suffix']}"


class WeightSource(Protocol):
    """What a model family loads its tensors from, one by one."""

    def take(self, name: str, shape: tuple[int, ...]) -> HostMatrix: ...

    def finish(self) -> None: ...


class Checkpoint:
    """Owns the list of the tensors that were taken. `tensors`: all of them by name, with their shapes and formats."""

    def __init__(self, source: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self._source = source
        self.tensors = tensors
        self._taken: set[str] = set()

    @property
    def has_head(self) -> bool:
        """Whether there is a head beside the embeddings: in files of a model that config.json ties, one of other
        values."""
        return HEAD_NAME in self.tensors

    @property
    def is_quantized(self) -> bool:
        """Whether all matrices are."""
        matrices = [one for one in self.tensors.values() if len(one.shape) > 1]
        return not any(one.is_converted or one.format_name in DENSE_NAMES.values() for one in matrices)

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self.tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> HostMatrix:
        """Read one tensor. A dense one is a read-only view of the file, whose pages are read when they are used. Raises
        as `find` does."""
        return self.find(name, shape).read()

    def find(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """One tensor, which counts as taken; nothing is read.

        Raises WeightMismatchError if it is missing or has another shape, UnsupportedModelError if its type is one of
        codes, of which no known format made a matrix.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise WeightMismatchError(f"{self._source} has no tensor {name} (shape {shape}): {self._why_missing(name)}")
        if tensor.shape != shape:
            raise WeightMismatchError(
                f"{self._source}: tensor {name} has shape {tensor.shape}, but the model's settings ask for {shape}"
            )
        if tensor.format_name in RAW_DTYPES:
            raise UnsupportedModelError(
                f"{self._source}: tensor {name} has type {tensor.format_name}, which is not supported; "
                f"known: {', '.join(DENSE_DTYPES)}, and quantized formats that config.json names"
            )
        self._taken.add(name)
        return tensor

    def _why_missing(self, name: str) -> str:
        """What the tensors beside it tell: that the module is quantized, for example."""
        module = name.removesuffix(".weight").rpartition(".")[0]
        packed = [other for other in self.names() if other.startswith(module) and other.endswith(PACKED_SUFFIXES)]
        if packed:
            return (
                f"it is quantized ({packed[0]}), but config.json has no quantization_config that says how: add the "
                "original's"
            )
        return "it is incomplete or of another architecture"

    def finish(self) -> None:
        """Raise WeightMismatchError if the files have tensors that were never taken: the model would be another one."""
        surplus = [name for name in self.names() if name not in self._taken and not self._is_zero_bias(name)]
        if surplus:
            shown = ", ".join(surplus[:5]) + (", ..." if len(surplus) > 5 else "")
            raise WeightMismatchError(
                f"{self._source} has {len(surplus)} tensor(s) that this architecture does not use: {shown}"
            )

    def _is_zero_bias(self, name: str) -> bool:
        """A bias that changes nothing: AutoGPTQ writes one for every matrix, and transformers and vLLM ignore it."""
        values = self.tensors[name].read() if name.endswith(".bias") else None
        return isinstance(values, np.ndarray) and not values.any()
