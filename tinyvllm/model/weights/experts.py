"""The experts of sparse layers under one name each, however the files hold them.

Afterwards a layer has `mlp.experts.{gate,up,down}_proj.weight`, (E * rows, columns): the experts' rows one expert after
another, and biases (E * rows,). Files have a tensor for each expert, or one of three dimensions for all, in which the
gate's and the up projection's rows may be together: one half after the other, or alternating (gpt-oss).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from tinyvllm.arrays import HostMatrix, QuantizedMatrix, format_of, join_rows, to_float16, to_float32
from tinyvllm.config import ExpertsKind, ModelConfig
from tinyvllm.errors import WeightMismatchError
from tinyvllm.model.weights.stored import DENSE_NAMES, StoredTensor
from tinyvllm.ops.formats.common import in_common_format

logger = logging.getLogger(__name__)

LAYER = re.compile(r"(?P<layer>model\.layers\.\d+\.)(?P<rest>.+)")
# Beginnings of the names of a layer's tensors in files, and ours
RENAMED = (
    ("block_sparse_moe.", "mlp."),  # Mixtral
    ("experts.switch_glu.", "mlp.experts."),  # MLX's Gemma 4
    ("experts.", "mlp.experts."),  # Gemma 4, which has a dense feed-forward besides
    ("router.proj.", "mlp.gate."),
    ("router.", "mlp.gate."),
    ("mlp.router.", "mlp.gate."),  # gpt-oss
    ("mlp.switch_mlp.", "mlp.experts."),  # MLX
    ("mlp.shared_experts.", "mlp.shared_expert."),  # DeepSeek, GLM
)
EACH = re.compile(r"mlp\.experts\.(?P<expert>\d{1,6})\.(?P<module>\w+)\.(?P<suffix>weight|bias)")
WHOLE = re.compile(r"mlp\.experts\.(?P<module>gate_up_proj|gate_proj|up_proj|down_proj)(?P<suffix>|\.weight|[._]bias)")
MODULES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's names, and ours
FUSED = ("gate_proj", "up_proj")  # the modules in gate_up_proj


def stack_experts(
    source: Path, tensors: Mapping[str, StoredTensor], config: ModelConfig, *, alternate: bool
) -> dict[str, StoredTensor]:
    """All tensors, with each matrix of experts as one. `alternate`: as FamilyFiles.alternates_experts.

    Nothing is read. Raises WeightMismatchError for experts that are missing, too many, or of other shapes than the
    model's settings say.
    """
    if config.experts is None:
        return dict(tensors)
    stacker = _Stacker(source, config.experts, config.hidden_size, alternate)
    for name, tensor in tensors.items():
        stacker.add(name, tensor)
    return stacker.finish()


def _renamed(rest: str) -> str:
    """Our name of a layer's tensor, of whatever family; both after `model.layers.N.`."""
    for beginning, ours in RENAMED:
        if rest.startswith(beginning):
            rest = ours + rest.removeprefix(beginning)
    return rest


@dataclass
class _Stacker:
    """Owns the tensors that were found so far, by our names, and the experts that are stored one by one."""

    source: Path
    kind: ExpertsKind
    hidden_size: int
    alternate: bool
    found: dict[str, StoredTensor] = field(default_factory=dict)
    each: dict[str, dict[int, StoredTensor]] = field(default_factory=dict)  # by the name of the whole, by expert

    def add(self, name: str, tensor: StoredTensor) -> None:
        in_layer = LAYER.fullmatch(name)
        if in_layer is None:
            self.found[name] = tensor
            return
        layer, rest = in_layer["layer"], _renamed(in_layer["rest"])
        if match := EACH.fullmatch(rest):
            module = MODULES.get(match["module"], match["module"])
            whole = f"{layer}mlp.experts.{module}.{match['suffix']}"
            self.each.setdefault(whole, {})[int(match["expert"])] = tensor
        elif match := WHOLE.fullmatch(rest):
            self._add_whole(layer + rest, f"{layer}mlp.experts.{match['module']}", match["suffix"], tensor)
        else:
            self.found[layer + rest] = tensor

    def finish(self) -> dict[str, StoredTensor]:
        for name, experts in self.each.items():
            self.found[name] = self._of_each(name, experts)
        return self.found

    # -- one tensor for each expert -----------------------------------------------------------------------------------

    def _of_each(self, name: str, experts: Mapping[int, StoredTensor]) -> StoredTensor:
        expected = range(self.kind.num_experts)
        absent, surplus = ([i for i in a if i not in b] for a, b in ((expected, experts), (experts, expected)))
        for problem, which in (("no tensor", absent), ("a tensor", surplus)):
            if which:
                raise WeightMismatchError(
                    f"{self.source} has {problem} {name} of expert {', '.join(map(str, which[:5]))}: the model's "
                    f"settings ask for experts 0 to {len(expected) - 1}; download it again"
                )
        parts = [experts[i] for i in expected]
        shape = self._shape(name)[1:]
        for expert, part in enumerate(parts):
            if part.shape != shape:
                raise WeightMismatchError(
                    f"{self.source}: tensor {name} of expert {expert} has shape {part.shape}, but the model's settings "
                    f"ask for {shape}"
                )
        names = dict.fromkeys(part.format_name for part in parts)
        return StoredTensor(
            (len(parts) * shape[0], *shape[1:]),
            partial(_read_each, name, parts),
            "+".join(names),
            sum(part.num_bytes for part in parts),
            any(part.is_converted for part in parts),
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        """What the settings ask for of all experts: (E, rows, columns), or (E, rows) of biases."""
        rows, cols = self.kind.ffn_size, self.hidden_size
        if "down_proj" in name:
            rows, cols = cols, rows
        elif "gate_up_proj" in name:
            rows *= 2
        shape = (self.kind.num_experts, rows)
        return shape if name.endswith("bias") else (*shape, cols)

    # -- one tensor for all experts -----------------------------------------------------------------------------------

    def _add_whole(self, name: str, module: str, suffix: str, tensor: StoredTensor) -> None:
        shape = self._shape(name)
        is_turned = len(shape) == 3 and self._is_turned(name, tensor, shape)
        if tensor.shape != ((shape[0], shape[2], shape[1]) if is_turned else shape):
            raise WeightMismatchError(
                f"{self.source}: tensor {name} has shape {tensor.shape}, but the model's settings ask for {shape}: "
                f"{self.kind.num_experts} experts with a feed-forward of {self.kind.ffn_size}"
            )
        end = ".bias" if suffix.endswith("bias") else ".weight"
        if not module.endswith("gate_up_proj"):
            self.found[module + end] = _Rows(shape, slice(None), is_turned).of(tensor)
            return
        half = shape[1] // 2
        slices = (slice(None, half), slice(half, None))
        if self.alternate:
            slices = (slice(0, None, 2), slice(1, None, 2))
        for part, rows in zip(FUSED, slices, strict=True):
            self.found[module.removesuffix("gate_up_proj") + part + end] = _Rows(shape, rows, is_turned).of(tensor)

    def _is_turned(self, name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> bool:
        """Whether an expert's rows and columns are interchanged, as in the unquantized files of gpt-oss, whose matrices
        are square, and of Qwen3-VL."""
        if tensor.format_name not in DENSE_NAMES.values():
            return False
        if self.alternate:
            return not name.endswith(".weight")  # which MLX and GGUF have
        return tensor.shape[1:] == (shape[2], shape[1]) and shape[1] != shape[2]


@dataclass(frozen=True)
class _Rows:
    """Some rows of every expert in a tensor of all experts. `shape`: (E, rows, columns) or (E, rows) of all rows."""

    shape: tuple[int, ...]
    rows: slice
    is_turned: bool  # the tensor is (E, columns, rows)

    @property
    def count(self) -> int:
        """Rows of an expert that are taken."""
        return len(range(*self.rows.indices(self.shape[1])))

    def of(self, tensor: StoredTensor) -> StoredTensor:
        """These rows, one expert's after another's."""
        shape = (self.shape[0] * self.count, *self.shape[2:])
        num_bytes = tensor.num_bytes * self.count // self.shape[1]
        return replace(tensor, shape=shape, read=partial(self._read, tensor.read), num_bytes=num_bytes)

    def _read(self, read: Callable[[], HostMatrix]) -> HostMatrix:
        values = read()
        if isinstance(values, QuantizedMatrix):
            if self.count == self.shape[1]:
                return values
            index = np.arange(math.prod(self.shape[:2])).reshape(self.shape[:2])[:, self.rows]
            return values.rows(index.reshape(-1))
        if not self.is_turned:
            return values[:, self.rows].reshape(-1, *self.shape[2:])
        turned = np.empty((self.shape[0], self.count, self.shape[2]), values.dtype)
        for ours, stored in zip(turned, values, strict=True):  # an expert at a time, which the caches hold
            ours[...] = stored.T[self.rows]
        return turned.reshape(-1, self.shape[2])


def _read_each(name: str, parts: Sequence[StoredTensor]) -> HostMatrix:
    """The rows of all experts. Those of quantized ones are unpacked when they are packed."""
    values: Sequence[HostMatrix] = [part.read() for part in parts]
    if len({format_of(matrix) for matrix in values}) > 1:
        values = _in_one_format(name, values)
    return join_rows([replace(m, codes=m.lazy_codes) if isinstance(m, QuantizedMatrix) else m for m in values])


def _in_one_format(name: str, experts: Sequence[HostMatrix]) -> Sequence[HostMatrix]:
    """Experts whose formats differ in one that holds them all, or in float16, with a warning."""
    if all(isinstance(matrix, np.ndarray) for matrix in experts):
        return [to_float32(matrix) for matrix in experts]
    common = in_common_format(experts)
    if common is not None:
        return common
    formats = dict.fromkeys(m.format.name if isinstance(m, QuantizedMatrix) else str(m.dtype) for m in experts)
    megabytes = 2 * sum(math.prod(matrix.shape) for matrix in experts) / 1e6
    logger.warning(
        "%s: experts in %s have no common format: all become float16, %.1f MB", name, ", ".join(formats), megabytes
    )
    return [to_float16(matrix) for matrix in experts]
