"""What lists of models say of a model: its size, formats and shape, from the headers of its files.

Values are named as in GGUF metadata (https://github.com/ggml-org/ggml/blob/9d325133eed396b7bf005a53a83d9747cbd8bde1/docs/gguf.md),
whatever the format of the files, because the clients that read them know those names.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tinyvllm.config import ModelConfig, ModelFiles
from tinyvllm.storage.gguf_file import GGUFFile, split_files
from tinyvllm.storage.gguf_keys import size_keys
from tinyvllm.storage.model_config import read_model_config
from tinyvllm.storage.regular_file import entries_of, file_status, is_regular, open_regular
from tinyvllm.storage.safetensors_header import read_header
from tinyvllm.storage.values import Values, read_json

MAX_LISTED = 5  # longer lists are left out of `ModelSummary.info`, as in Ollama
SAMPLE_BYTES = 1 << 16  # of a file's start, middle and end, for its fingerprint
# What quantized checkpoints store beside their weights
_BESIDE_WEIGHTS: tuple[str, ...] = (
    "scales",
    "scale",
    "zeros",
    "qzeros",
    "biases",
    "g_idx",
    "weight_scale",
    "weight_shape",
)
_BESIDE_WEIGHTS += ("weight_zero_point", "input_scale", "weight_g_idx", "weight_scale_inv", "weight_global_scale")
_PACKED_BITS = {"I32": 32, "U32": 32, "U8": 8}  # by safetensors' dtypes
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file lists it."""

    name: str
    dtype: str  # GGUF's or safetensors' name
    shape: tuple[int, ...]  # as in the file: GGUF lists the columns first


@dataclass(frozen=True)
class ModelSummary:
    """A model's files at a glance."""

    format: str  # gguf or safetensors
    num_bytes: int  # of all files
    modified_s: float  # Unix time of the latest change
    fingerprint: str  # 64 hex digits: the same for the same files, wherever they are
    num_parameters: int
    quantization: str  # "Q4_K_M", "BF16", "AWQ 4-bit"
    config: ModelConfig
    info: Mapping[str, Any]  # by GGUF's keys; [] in place of vocabularies and other long lists
    tensors: tuple[StoredTensor, ...]


def summarize(files: ModelFiles) -> ModelSummary:
    """Reads headers, and again only if the files have changed. Raises ModelError as `read_model_config` does, and for
    files that cannot be read."""
    statuses = [(path, file_status(path)) for path in _paths(files)]
    versions = tuple((str(path), status.st_mtime_ns, status.st_size) for path, status in statuses)
    return _summarize(files.kind, files.path, files.name, versions)


@lru_cache(maxsize=64)
def _summarize(kind: str, path: Path, name: str, versions: tuple[tuple[str, int, int], ...]) -> ModelSummary:
    files = ModelFiles(kind, path, name)
    config = read_model_config(files)
    if kind == "gguf":
        file = GGUFFile(path)
        tensors = [StoredTensor(one.name, one.ggml_type, one.shape[::-1]) for one in file.tensors.values()]
        num_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        quantization = _gguf_quantization(file)
        info = {key: [] if _is_long(value) else finite(value) for key, value in file.metadata.items()}
        info["general.parameter_count"] = num_parameters
    else:
        tensors = list(_stored_tensors(path))
        values = read_json(path / "config.json")
        method, bits = _hf_quantization(values)
        num_parameters = sum(_num_weights(tensor, bits) for tensor in tensors)
        quantization = f"{method} {bits}-bit" if method else _usual_dtype(tensors)
        info = _described(config, str(values.get("model_type") or config.architecture), name) | {
            "general.parameter_count": num_parameters
        }
    return ModelSummary(
        format="gguf" if kind == "gguf" else "safetensors",
        num_bytes=sum(num_bytes for _, _, num_bytes in versions),
        modified_s=max(mtime_ns for _, mtime_ns, _ in versions) / 1e9,
        fingerprint=_fingerprint(versions),
        num_parameters=num_parameters,
        quantization=quantization,
        config=config,
        info=info,
        tensors=tuple(tensors),
    )


def finite(value: Any) -> Any:
    """A value for JSON, which has no infinite numbers: None in their place."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_long(value: object) -> bool:
    return isinstance(value, list) and len(value) > MAX_LISTED


def _paths(files: ModelFiles) -> list[Path]:
    if files.kind == "gguf":
        return split_files(files.path)
    return [path for path in entries_of(files.path) if is_regular(path) and not path.name.startswith(".")]


def _fingerprint(versions: Iterable[tuple[str, int, int]]) -> str:
    """Of names, sizes and samples of all files: reading weights of many GB takes minutes."""
    digest = hashlib.sha256()
    for path, _, num_bytes in versions:
        digest.update(f"{Path(path).name}\0{num_bytes}\0".encode())
        with open_regular(Path(path)) as file:
            for start in sorted({0, max(0, num_bytes // 2), max(0, num_bytes - SAMPLE_BYTES)}):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _gguf_quantization(file: GGUFFile) -> str:
    """The file type that its writer states, else the type of most weights."""
    from gguf.constants import LlamaFileType  # here: takes 0.06 s

    stated = Values(file.path, file.metadata).optional_integer("general.file_type", at_least=0)
    if stated in {int(known) for known in LlamaFileType}:
        return LlamaFileType(stated).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    counts: Counter[str] = Counter()
    for tensor in file.tensors.values():
        counts[tensor.ggml_type] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0] if counts else "unknown"


def _stored_tensors(directory: Path) -> Iterable[StoredTensor]:
    for path in sorted(directory.glob("*.safetensors")):
        for name, entry in read_header(path).items():
            yield StoredTensor(name, entry.dtype, entry.shape)


def _hf_quantization(values: Mapping[str, Any]) -> tuple[str, int]:
    """(method, bits) of quantized weights; ("", 16) if there are none."""
    settings = values.get("quantization_config") or values.get("quantization")
    if not isinstance(settings, dict):
        return "", 16
    method = str(settings.get("quant_algo") or settings.get("quant_method") or "mlx").replace("_", "-").upper()
    groups = settings.get("config_groups")
    group: Any = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    bits = settings.get("bits") or settings.get("w_bit") or (weights or {}).get("num_bits")
    if bits is None:
        bits = 8 if "8" in method else 4 if "4" in method else 16
    return method, bits if isinstance(bits, int) and 0 < bits <= 16 else 16


def _num_weights(tensor: StoredTensor, bits: int) -> int:
    """The weights that a stored tensor holds, which may be packed."""
    last = tensor.name.rpartition(".")[2]
    if last in _BESIDE_WEIGHTS or (last.endswith(("_scales", "_scale", "_zeros")) and bits < 16):
        return 0
    count, packed = math.prod(tensor.shape), _PACKED_BITS.get(tensor.dtype)
    return count if packed is None or bits >= 16 else count * packed // bits


def _usual_dtype(tensors: Iterable[StoredTensor]) -> str:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0] if counts else "unknown"


def _described(config: ModelConfig, architecture: str, name: str) -> dict[str, Any]:
    """A configuration under GGUF's keys."""
    info: dict[str, Any] = {
        "general.architecture": architecture,
        "general.basename": name.rpartition("/")[2],
        "general.type": "model",
    }
    values = size_keys(config)
    if config.window is not None:
        values["attention.sliding_window"] = config.window
    if config.experts is not None:
        values["expert_count"] = config.experts.num_experts
        values["expert_used_count"] = config.experts.top_k
    return info | {f"{architecture}.{key}": value for key, value in values.items()}
