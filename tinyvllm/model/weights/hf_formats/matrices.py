"""What the formats of Hugging Face directories share: a matrix in several tensors, packed integers, scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tinyvllm.arrays import GROUPS, Format, HostMatrix, QuantizedMatrix, ScaleFormat, Scales
from tinyvllm.errors import UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.storage.values import Values

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1


@dataclass(frozen=True)
class Parts:
    """The tensors of one quantized matrix, by the ends of their names."""

    name: str  # what their names begin with: the module, mostly
    tensors: Mapping[str, StoredTensor]
    settings: Values  # what the model's files say about the quantization

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.tensors

    def __getitem__(self, suffix: str) -> StoredTensor:
        """Raises WeightMismatchError if the tensor is missing."""
        if suffix not in self.tensors:
            present = ", ".join(self.name + suffix for suffix in self.tensors)
            raise WeightMismatchError(
                f"{self.settings.source.parent} has {present}, but no {self.name}{suffix}: download it again"
            )
        return self.tensors[suffix]

    def read(self, suffix: str) -> np.ndarray:
        """The tensor's values as a matrix, with the experts' rows one after another."""
        values = self[suffix].read()
        assert isinstance(values, np.ndarray), self.name + suffix
        return values.reshape(-1, values.shape[-1]) if values.ndim > 2 else values

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def stored(self, shape: tuple[int, ...], format_name: str, read: Callable[[Parts], HostMatrix]) -> StoredTensor:
        """The assembled matrix, which `read` makes of these tensors when it is taken."""
        return StoredTensor(shape, lambda: read(self), format_name, self.num_bytes)

    def converted(self, shape: tuple[int, ...], format_name: str, read: Callable[[Parts], np.ndarray]) -> StoredTensor:
        """The same where no packed format holds the values: they become float16."""
        return StoredTensor(
            shape, lambda: read(self).astype(np.float16), format_name, self.num_bytes, is_converted=True
        )

    def mismatch(self, suffix: str, expected: str) -> WeightMismatchError:
        """The error that a tensor has a shape which contradicts the others or the settings."""
        return WeightMismatchError(
            f"{self.settings.source.parent}: tensor {self.name}{suffix} has shape {self[suffix].shape}, but {expected}"
        )

    def unsupported(self, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.settings.source.parent}: {self.name} {problem}")


@dataclass(frozen=True)
class HFFormat:
    """How the tensors of a matrix are named, and what makes a matrix of them."""

    key: str  # the end of a name that only quantized matrices have
    others: tuple[str, ...]  # ends of the names of the other tensors, present or not
    build: Callable[[Parts], StoredTensor]
    result: str = ".weight"  # the end of the matrix's name

    def assemble(self, tensors: Mapping[str, StoredTensor], settings: Values) -> dict[str, StoredTensor]:
        """All tensors, with each matrix in place of the tensors that it is made of."""
        assembled = dict(tensors)
        for name in tensors:
            if not name.endswith(self.key):
                continue
            prefix = name.removesuffix(self.key)
            found = {end: tensors[prefix + end] for end in (self.key, *self.others) if prefix + end in tensors}
            for end in found:
                del assembled[prefix + end]
            assembled[prefix + self.result] = self.build(Parts(prefix, found, settings))
        return assembled


# -- codes -----------------------------------------------------------------------------------------------------------


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row: a stream of integers of `bits` bits, low bits first. packed (N, words) of
    any integers -> (N, count) uint8."""
    data = np.ascontiguousarray(packed).view(np.uint8)  # (N, bytes)
    if bits == 8:
        return data[:, :count]
    period = math.lcm(8, bits)  # bits after which codes begin at a byte again
    num_bytes, num_codes = period // 8, period // bits
    periods = -(-count // num_codes)
    if data.shape[1] < periods * num_bytes:
        data = np.pad(data, ((0, 0), (0, periods * num_bytes - data.shape[1])))
    codes = np.empty((len(data), periods * num_codes), np.uint8)
    for i in range(num_codes):
        byte, shift = divmod(i * bits, 8)
        code = codes[:, i::num_codes]
        np.right_shift(data[:, byte : periods * num_bytes : num_bytes], shift, out=code)
        if shift + bits > 8:
            code |= data[:, byte + 1 : periods * num_bytes : num_bytes] << (8 - shift)
        code &= (1 << bits) - 1
    return codes[:, :count]


def signed_bytes(codes: np.ndarray) -> np.ndarray:
    """Unsigned codes of 8 bits, less 128: how `Format` has them."""
    return (codes ^ 0x80).view(np.int8)


# -- scales ----------------------------------------------------------------------------------------------------------


def group_of(num_cols: int, group: int) -> int | None:
    """The largest group of columns that `Format` knows, and which divides both the matrix's own group and its width."""
    return next((size for size in reversed(GROUPS) if group % size == 0 and num_cols % size == 0), None)


def by_group(values: np.ndarray, num_cols: int, group: int) -> np.ndarray:
    """Scales (N, groups of the file) -> (N, num_cols // group): each repeated for all the groups that it covers. The
    last of a row may cover fewer columns."""
    num_groups = num_cols // group
    per_scale = -(-num_groups // values.shape[1])
    repeated = np.repeat(values, per_scale, axis=1) if per_scale > 1 else values
    return repeated[:, :num_groups]


def affine(
    name: str,
    bits: int,
    group: int,
    codes: np.ndarray,
    scale: np.ndarray,
    zeros: np.ndarray | None = None,
) -> QuantizedMatrix:
    """(code - zero) * scale. codes (N, K) uint8, unsigned; scale and zeros (N, K // group), zeros unsigned integers of
    at most 255, or None if all are half of the codes' range."""
    half, form = 1 << (bits - 1), ScaleFormat(group, dtype=scale_dtype(scale))
    if zeros is not None and (zeros == half).all():
        zeros = None
    if bits == 8:
        codes, half = signed_bytes(codes), 0
    if zeros is None:
        return QuantizedMatrix(Format(name, bits, group, offset=half, scale=form), codes, Scales(scale))
    minimum = ScaleFormat(group, has_steps=True, dtype=form.dtype)
    fmt = Format(name, bits, group, offset=-128 if bits == 8 else 0, scale=form, minimum=minimum)
    return QuantizedMatrix(fmt, codes, Scales(scale), Scales(-scale, zeros.astype(np.uint8)))


def scale_dtype(scale: np.ndarray) -> str:
    """The name that ScaleFormat has for an array's dtype."""
    return SCALE_NAMES[scale.dtype.name]


SCALE_NAMES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": "e4m3",
    "float8_e8m0fnu": "e8m0",
}
