"""METAL's simdgroup matrices, as statements of its language.

tinygrad's WMMA makes a dozen nodes of each product, and a statement here has hundreds of products. Matrices are
variables, which later statements and values name. Only a barrier or the end of a loop can wait for a statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.ops.kernel.body import F16, F32

PARTS = "xyzw"  # the words that a lane loads at once, each its part of an operand of 8 columns
PAD = 8  # values of padding after each 64, so that neighboring threads use different banks
ELEMENTS = 2  # values of a matrix that a lane holds
NAMES = {F16: "half", dtypes.bfloat16: "bfloat"}
ZERO = "make_filled_simdgroup_matrix<float, 8, 8>(0.0f)"


def padded(size: int) -> int:
    """The size of a tile of 64 or more values with its padding."""
    return size + size // 64 * PAD


def declared(names: Iterable[str]) -> str:
    """Declares accumulators, all zero."""
    return f"simdgroup_float8x8 {', '.join(f'{name} = {ZERO}' for name in names)};"


def loaded(name: str, place: int, parts: int = len(PARTS)) -> str:
    """Loads a lane's words of four operands from threadgroup memory. `place`: the statement's source that points to
    them."""
    return f"uint{parts} {name} = *((threadgroup uint{parts}*)({{{place}}}));"


def operands(dtype: DType, names: Sequence[str], parts: str = PARTS) -> list[str]:
    """Makes operands of loaded words: those of `name` are `namex`, `namey`, ..."""
    lines, kind = [], NAMES[dtype]
    for name in names:
        lines.append(f"simdgroup_{kind}8x8 {', '.join(name + part for part in parts)};")
        for part in parts:
            value = f"as_type<{kind}2>({name}.{part})"
            lines += [f"{name}{part}.thread_elements()[{e}] = {value}[{e}];" for e in range(ELEMENTS)]
    return lines


def product(total: str, left: str, right: str) -> str:
    """Adds left @ right to an accumulator."""
    return f"simdgroup_multiply_accumulate({total}, {left}, {right}, {total});"


def statement(lines: Sequence[str], *sources: UOp, has_scope: bool = True) -> UOp:
    """A statement of `lines`, in which {i} is the i-th source. `has_scope`: what it declares ends with it."""
    text = "\n    ".join(lines)
    return UOp(Ops.CUSTOM, dtypes.void, src=sources, arg="{{ " + text + " }}" if has_scope else text)


def elements(names: Iterable[str], after: UOp) -> list[UOp]:
    """A lane's two values of each matrix, after a statement or the end of a loop."""
    zero = UOp.const(0.0, F32)  # is not rendered: it tells tinygrad the shape, one value
    texts = [f"{name}.thread_elements()[{e}]" for name in names for e in range(ELEMENTS)]
    return [UOp(Ops.CUSTOM, F32, src=(zero, after), arg=text) for text in texts]
