"""What an adapter's files say about it: peft's adapter_config.json, or mlx-lm's.

A setting that would change the adapter's outputs in a way that is not supported is refused by its name. Settings of
training alone (dropout, which layers were chosen) are ignored: the tensors tell which modules an adapter changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.regular_file import is_present, open_regular
from tinyvllm.storage.strict_json import read_json
from tinyvllm.storage.values import Values, shown

CONFIG_NAME, PEFT_WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
PEFT_PICKLE = "adapter_model.bin"
MAX_RANK = 512
MAX_PATTERNS = 4096
DIGEST_BYTES, PIECE_BYTES = 16, 1 << 20
# peft's settings that must be absent, false or empty, and what they stand for
UNSUPPORTED = {
    "use_dora": "DoRA, which also scales the base model's columns",
    "lora_bias": "biases of LoRA's own",
    "modules_to_save": "whole modules beside the low-rank matrices",
    "trainable_token_indices": "rows of the embeddings",
    "layer_replication": "repeated layers",
    "target_parameters": "parameters that are not those of linear layers, such as experts'",
    "alora_invocation_tokens": "Activated LoRA, which is switched on by tokens",
    "use_qalora": "QALoRA, which pools its input",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow, which routes tokens between adapters",
    "megatron_config": "Megatron's parallel layers",
}
# Initializations that change the base model's weights, so that the adapter fits no other (peft converts it on request)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")


@dataclass(frozen=True)
class Patterns:
    """Numbers by module: of those whose names end with a pattern, or equal it if it begins with ^."""

    numbers: Mapping[str, int]

    def find(self, module: str, default: int) -> int:
        """The number of the first pattern that matches a module's name, as in peft."""
        for pattern, number in self.numbers.items():
            name = pattern.removeprefix("^")
            if module == name or (name == pattern and module.endswith(f".{name}")):
                return number
        return default


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's settings. `weights`: the file with its tensors."""

    source: Path  # the file that says so
    weights: Path
    is_mlx: bool
    rank: int
    alpha: float = 0.0
    is_rank_stabilized: bool = False  # scale alpha / sqrt(r) (Kalajdzievski 2023), not alpha / r
    ranks: Patterns = field(default_factory=lambda: Patterns({}))
    alphas: Patterns = field(default_factory=lambda: Patterns({}))
    fixed_scale: float | None = None  # mlx-lm states the scale itself
    base_model: str = ""  # what the files call it; for people

    @property
    def max_rank(self) -> int:
        """The largest rank of a module."""
        return max([self.rank, *self.ranks.numbers.values()])

    def rank_of(self, module: str) -> int:
        return self.ranks.find(module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A x is multiplied by."""
        if self.fixed_scale is not None:
            return self.fixed_scale
        rank, alpha = self.rank_of(module), self.alphas.find(module, -1)
        divisor = math.sqrt(rank) if self.is_rank_stabilized else rank
        return (self.alpha if alpha < 0 else alpha) / divisor


def read_adapter_config(directory: Path) -> AdapterConfig:
    """The settings of the adapter in a directory. Raises ModelError, and UnsupportedModelError for an adapter of a kind
    that is not supported, which names the setting."""
    path = directory / CONFIG_NAME
    if not directory.is_dir():
        raise ModelError(f"the adapter's path {directory} is not a directory: give one with {CONFIG_NAME}")
    if not is_present(path):
        raise ModelError(
            f"{directory} has no {CONFIG_NAME}: give the directory of an adapter that peft or mlx-lm saved"
        )
    values = Values(path, read_json(path))
    return _read_peft(directory, values) if values.get("peft_type") is not None else _read_mlx(directory, values)


def digest_of(config: AdapterConfig) -> str:
    """A hash of the adapter's files: two adapters with the same digest compute the same. Raises ModelError."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for path in (config.source, config.weights):
        with open_regular(path) as file:
            while piece := file.read(PIECE_BYTES):
                found.update(piece)
    return found.hexdigest()


def stamp_of(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """The names, sizes and times of an adapter's files: different after they were replaced. Takes microseconds."""
    found = []
    for name in (CONFIG_NAME, PEFT_WEIGHTS, MLX_WEIGHTS):
        with contextlib.suppress(OSError):
            info = (directory / name).stat()
            found.append((name, info.st_size, info.st_mtime_ns))
    return tuple(found)


def _read_peft(directory: Path, values: Values) -> AdapterConfig:
    if values.get("peft_type") != "LORA":
        values.unsupported("peft_type", "LORA")
    for key, meaning in UNSUPPORTED.items():
        if values.get(key) not in (None, False, [], {}):
            raise UnsupportedModelError(
                f"{values.source}: {key} is {shown(values.get(key))}, which is not supported ({meaning}); supported "
                "are low-rank matrices of linear layers"
            )
    if values.text("bias", "none") != "none":
        values.unsupported("bias", "none")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UnsupportedModelError(
            f"{values.source}: init_lora_weights is {shown(start)}, which changes the base model's weights: save the "
            "adapter with path_initial_model_for_weight_conversion, which makes a plain one of it"
        )
    weights = directory / PEFT_WEIGHTS
    if not is_present(weights) and is_present(directory / PEFT_PICKLE):
        raise UnsupportedModelError(
            f"{directory} has its weights as {PEFT_PICKLE}, a pickle file, which can run code when it is read: save "
            "the adapter with safe_serialization=True"
        )
    return AdapterConfig(
        source=values.source,
        weights=weights,
        is_mlx=False,
        rank=values.integer("r", at_most=MAX_RANK),
        alpha=_positive(values, "lora_alpha", 8.0),
        is_rank_stabilized=values.flag("use_rslora"),
        ranks=_patterns(values, "rank_pattern", MAX_RANK),
        alphas=_patterns(values, "alpha_pattern", 1 << 20),
        base_model=values.text("base_model_name_or_path", ""),
    )


def _positive(values: Values, key: str, default: float) -> float:
    """A number above 0, the library's default if the key is absent. What null stands for, no library says."""
    if values.get(key) is None and values.prefix + key in values.values:
        raise ModelError(f"{values.source}: {values.name(key)} is null: it must be a number above 0")
    return values.positive(key, default)


def _read_mlx(directory: Path, values: Values) -> AdapterConfig:
    if values.choice("fine_tune_type", ("lora", "dora", "full"), "lora") != "lora":
        values.unsupported("fine_tune_type", "lora")
    inner = values.inner("lora_parameters")
    if inner is None:
        raise ModelError(
            f"{values.source} has neither peft_type nor lora_parameters: it is the configuration of no adapter that "
            "peft or mlx-lm saved"
        )
    return AdapterConfig(
        source=values.source,
        weights=directory / MLX_WEIGHTS,
        is_mlx=True,
        rank=inner.integer("rank", at_most=MAX_RANK),
        fixed_scale=_positive(inner, "scale", 20.0),
        base_model=values.text("model", ""),
    )


def _patterns(values: Values, key: str, at_most: int) -> Patterns:
    """Numbers by patterns. peft takes regular expressions; here a pattern is a module's name, or the end of one."""
    inner = values.inner(key)
    if inner is None:
        return Patterns({})
    if len(inner.values) > MAX_PATTERNS:
        raise ModelError(
            f"{values.source}: {key} has {len(inner.values)} patterns, but may have at most {MAX_PATTERNS}"
        )
    numbers: dict[str, Any] = {}
    for pattern in inner.values:
        name = pattern.replace("\\.", ".").removesuffix("$")
        if not set(name.removeprefix("^")) <= NAME_CHARACTERS:
            raise UnsupportedModelError(
                f"{values.source}: {key} has the regular expression {shown(pattern)}, which is not supported: write "
                "out the modules' names"
            )
        numbers[name] = inner.integer(pattern, at_most=at_most)
    return Patterns(numbers)
