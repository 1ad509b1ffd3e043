"""What the formats of Hugging Face directories share: a matrix in several tensors, packed integers, scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from ml_dtypes import float8_e4m3fn

from tinyvllm.arrays import (
    E2M1,
    GROUPS,
    SCALE_DTYPES,
    Format,
    HostMatrix,
    LazyCodes,
    QuantizedMatrix,
    ScaleFormat,
    Scales,
    to_float16,
)
from tinyvllm.errors import UnsupportedModelError, WeightMismatchError
from tinyvllm.model.weights.stored import DENSE_NAMES, StoredTensor
from tinyvllm.storage.values import Values


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

    def require(self, suffix: str, shape: tuple[int | None, ...], types: tuple[str, ...]) -> tuple[int, ...]:
        """The shape of a tensor, whose last sizes must be those of `shape` (None: any), of one of the `types`. Others
        before them are experts. Raises WeightMismatchError, UnsupportedModelError."""
        tensor = self[suffix]
        if tensor.format_name not in types:
            raise self.unsupported(
                f"has {suffix.lstrip('.')} of type {tensor.format_name}, which is not supported; known: "
                + ", ".join(types)
            )
        last = tensor.shape[max(len(tensor.shape) - len(shape), 0) :]
        fits = len(last) == len(shape) and all(need in (None, size) for size, need in zip(last, shape, strict=True))
        if not fits or 0 in tensor.shape:
            expected = ", ".join("any" if need is None else str(need) for need in shape)
            raise self.mismatch(suffix, f"the other tensors and the settings ask for ({expected})")
        return tensor.shape

    def require_exactly(self, suffix: str, shape: tuple[int | None, ...], types: tuple[str, ...]) -> tuple[int, ...]:
        """As `require`, without sizes before those of `shape`."""
        found = self.require(suffix, shape, types)
        if len(found) != len(shape):
            raise self.mismatch(suffix, f"the other tensors have {len(shape)} dimensions")
        return found

    def require_matrix(
        self, suffix: str, shape: tuple[int | None, int | None], types: tuple[str, ...]
    ) -> tuple[int, int]:
        """As `require`, of a tensor of two dimensions."""
        found = self.require(suffix, shape, types)
        if len(found) != 2:
            raise self.mismatch(suffix, "this format has no experts")
        return found[0], found[1]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def stored(self, shape: tuple[int, ...], format_name: str, read: Callable[[Parts], HostMatrix]) -> StoredTensor:
        """The assembled matrix, which `read` makes of these tensors when it is taken."""
        return StoredTensor(shape, lambda: read(self), format_name, self.num_bytes)

    def converted(self, shape: tuple[int, ...], format_name: str, read: Callable[[Parts], np.ndarray]) -> StoredTensor:
        """The same where no packed format holds the values: they become float16."""
        return StoredTensor(shape, lambda: to_float16(read(self)), format_name, self.num_bytes, is_converted=True)

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


# Names of types of tensors
WORDS = ("I32", "U32")
INTEGERS = (*WORDS, "I64")
FLOATS = tuple(DENSE_NAMES.values())

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


def stream_codes(packed: np.ndarray, bits: int, num_cols: int) -> LazyCodes:
    """The codes (N, num_cols) of rows that are streams of bits, as Format has them: 8 bits less 128."""
    return LazyCodes(lambda rows: as_format(unpack_bits(packed[rows], bits, num_cols), bits), (len(packed), num_cols))


def as_format(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes as Format has them: those of 8 bits less 128."""
    return (codes ^ 0x80).view(np.int8) if bits == 8 else codes


# -- scales ----------------------------------------------------------------------------------------------------------

SCALE_NAMES = {str(dtype): name for name, dtype in SCALE_DTYPES.items()}  # ScaleFormat's names by NumPy's


def scale_format(
    scale: np.ndarray, group: int, *, has_steps: bool = False, has_multiplier: bool = False
) -> ScaleFormat:
    """One scale for each group, as the array stores it."""
    return ScaleFormat(group, has_steps, SCALE_NAMES[str(scale.dtype)], has_multiplier)


@dataclass(frozen=True)
class Groups:
    """The columns of a row that share a scale: in the file, and here, where a scale is repeated if Format's groups are
    shorter."""

    num_cols: int
    stored: int  # a multiple of `group`
    group: int

    @property
    def label(self) -> str:
        """What users call them."""
        return f"g{self.stored}" if self.stored < self.num_cols else "channel"

    @property
    def num_stored(self) -> int:
        """How many there are in a row of the file."""
        return -(-self.num_cols // self.stored)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """(N, ceil(num_cols / stored)) -> (N, num_cols // group)."""
        repeated = np.repeat(values, self.stored // self.group, axis=1) if self.stored > self.group else values
        return np.ascontiguousarray(repeated[:, : self.num_cols // self.group])


def groups_of(parts: Parts, num_cols: int, stored: int) -> Groups:
    """The groups of a matrix that has a scale for every `stored` columns, or for all. Raises UnsupportedModelError if
    no group of Format divides them."""
    if stored >= num_cols:
        stored = -(-num_cols // GROUPS[-1]) * GROUPS[-1]
    found = next((size for size in reversed(GROUPS) if stored % size == 0 and num_cols % size == 0), None)
    if found is None:
        known = ", ".join(map(str, GROUPS))
        raise parts.unsupported(f"has groups of {stored} in {num_cols} columns: supported are multiples of {known}")
    return Groups(num_cols, stored, found)


def weight_groups(settings: Values) -> list[Values]:
    """compressed-tensors' groups of modules that are quantized alike."""
    groups = settings.inner("config_groups")
    return [] if groups is None else [group for key in groups.values if (group := groups.inner(key)) is not None]


# -- matrices --------------------------------------------------------------------------------------------------------


def scaled_integers(
    name: str,
    bits: int,
    group: int,
    codes: np.ndarray | LazyCodes,
    offset: int,
    scale: np.ndarray,
    zeros: np.ndarray | None = None,
) -> QuantizedMatrix:
    """(code - offset - zero) * scale. codes (N, K) as QuantizedMatrix has them; scale and zeros (N, K // group), zeros
    of 8 bits."""
    form = scale_format(scale, group)
    if zeros is None:
        return QuantizedMatrix(Format(name, bits, group, offset=offset, scale=form), codes, Scales(scale))
    fmt = Format(name, bits, group, offset, form, scale_format(scale, group, has_steps=True))
    return QuantizedMatrix(fmt, codes, Scales(scale), Scales(-scale, zeros))


def unsigned_integers(
    name: str, bits: int, group: int, codes: LazyCodes, scale: np.ndarray, zeros: np.ndarray | None = None
) -> QuantizedMatrix:
    """(code - zero) * scale. Codes of 8 bits are stored less 128, zeros (uint8) never. Zeros that are all half of the
    range, or None, take no memory."""
    half = 1 << (bits - 1)
    if zeros is not None and (zeros == half).all():
        zeros = None
    offset = (half if zeros is None else 0) - (half if bits == 8 else 0)
    return scaled_integers(name, bits, group, codes, offset, scale, zeros)


def scaled_fp4(
    name: str, group: int, packed: np.ndarray, scale: np.ndarray, multiplier: float | None = None
) -> QuantizedMatrix:
    """E2M1 codes, two in a byte, the first in the low half. packed (N, K / 2) uint8, scale (N, K / group)."""
    fmt = Format(name, 4, group, scale=scale_format(scale, group, has_multiplier=multiplier is not None), codebook=E2M1)
    codes = stream_codes(packed, 4, scale.shape[1] * group)
    rows = None if multiplier is None else np.full(len(scale), multiplier, np.float32)
    return QuantizedMatrix(fmt, codes, Scales(np.ascontiguousarray(scale), multiplier=rows))


def scaled_fp8(name: str, group: int, codes: np.ndarray, scale: np.ndarray) -> QuantizedMatrix:
    """e4m3 codes (N, K), scale (N, K / group)."""
    fmt = Format(name, 8, group, scale=scale_format(scale, group), is_float8=True)
    return QuantizedMatrix(fmt, codes.view(float8_e4m3fn), Scales(np.ascontiguousarray(scale)))
