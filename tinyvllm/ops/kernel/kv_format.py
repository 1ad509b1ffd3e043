"""The bits of quantized keys and values, for the kernels of all devices (`config.KV_FORMATS` lists the formats).

- `fp8_e4m3`: a byte for each element: sign, 4 bits of exponent, 3 of mantissa (OCP 8-bit Floating Point Specification,
  2023, sec. 5), rounded to nearest even. What exceeds 448 becomes 448. There is no scale.
- `q8_0`: an 8-bit integer from -127 to 127 for each element, times the group's scale.
- `q4_0`: 4 bits for each element, which stand for -8 to 7, times the group's scale. The scale's sign is such that the
  largest element is -8. Byte i of a group's 16 holds element i in its low half and element i + 16 in its high half.

A group is 32 consecutive elements of a head, and its scale is a float16. In memory the codes of a head follow each
other, and its scales are in a plane of their own, one for each group (a CPU has an order of its own:
ops/cpu/attention.py). ops/kv_reference.py is the same in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinygrad import UOp, dtypes

from tinyvllm.config import KVFormat
from tinyvllm.ops.kernel.body import F16, F32, I32, U16, U32, balanced

E4M3_MAX = 448.0
E4M3_UNIT = 256.0  # `e4m3_half` is the value divided by this
Q4_ZERO = 8  # the code of 0
_ROUNDER = 12582912.0  # 1.5 * 2^23: the sum of this and a small number has no fraction
_ROUNDER_BITS = 0x4B400000
_SMALL, _SMALL_BITS = 16384.0, 0x46800000  # its last bit is worth 2^-9, as that of e4m3's subnormal numbers
_LEAST_NORMAL = 2.0**-6


def rounded(x: UOp) -> UOp:
    """The integer next to x, of two the even one; |x| is below 2^22. In bits, which no compiler simplifies."""
    return (x + _ROUNDER).bitcast(I32) - _ROUNDER_BITS


def largest(values: Sequence[UOp]) -> UOp:
    return balanced(values, lambda a, b: a.maximum(b))


# -- groups with a scale -----------------------------------------------------------------------------------------------


def group_extreme(form: KVFormat, values: Sequence[UOp]) -> UOp:
    """What a group's scale depends on: of q8_0 the largest magnitude; of q4_0 the value that is farthest from 0, and of
    two that are equally far the positive one."""
    if form.name == "q8_0":
        return largest([value.maximum(value * -1.0) for value in values])
    return farthest(largest(values), largest([value * -1.0 for value in values]) * -1.0)


def farthest(highest: UOp, lowest: UOp) -> UOp:
    """Of q4_0: the extreme of a group with this maximum and this minimum."""
    return (highest < lowest * -1.0).where(lowest, highest)


def group_scale(form: KVFormat, extreme: UOp) -> UOp:
    """The scale, float16, of a group with this extreme."""
    return (extreme * (1.0 / _last_code(form))).cast(F16)


def group_inverse(form: KVFormat, extreme: UOp) -> UOp:
    """What values are multiplied by, float32: 1 / the scale before it is rounded, as in llama.cpp; 0 for zeros."""
    return extreme.ne(0.0).where(extreme.reciprocal() * _last_code(form), 0.0)


def group_code(form: KVFormat, value: UOp, inverse: UOp) -> UOp:
    """The code of a value, int32: of q8_0 from -127 to 127, of q4_0 from 0 to 15. `inverse`: of `group_inverse`."""
    if form.name == "q8_0":
        return rounded((value * inverse).maximum(-127.0).minimum(127.0))
    return rounded((value * inverse).maximum(-8.0).minimum(7.0)) + Q4_ZERO


def _last_code(form: KVFormat) -> float:
    """What the extreme becomes."""
    return {"q8_0": 127.0, "q4_0": -8.0}[form.name]


# -- fp8_e4m3 ----------------------------------------------------------------------------------------------------------


def e4m3_code(x: UOp) -> UOp:
    """The code of x, a uint32 up to 255."""
    bits = x.bitcast(U32)
    size = (bits & 0x7FFFFFFF).bitcast(F32).minimum(E4M3_MAX)
    normal = size.bitcast(U32)
    # 20 bits of the mantissa go, and the exponent's bias changes from 127 to 7
    normal = ((normal + 0x7FFFF + ((normal >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (size + _SMALL).bitcast(U32) - _SMALL_BITS
    return (size < _LEAST_NORMAL).where(subnormal, normal) | ((bits >> 24) & 0x80)


def e4m3_half(code: UOp) -> UOp:
    """A float16 of 1 / E4M3_UNIT of the number that a code (of any integer dtype, its byte the lowest) stands for: its
    exponent has the same bits, with another bias."""
    wide = code.cast(dtypes.int16) if code.dtype == dtypes.int8 else code.cast(U16)
    bits = (wide << 7) & 0x3F80 | (wide << 8) & 0x8000 if wide.dtype == U16 else (wide << 7) & -0x4080
    return bits.bitcast(F16)
