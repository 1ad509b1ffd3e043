"""Codebooks of 16 small integers in the CPU's products: a byte shuffle looks up 16 codes at once.

A statement in C, because clang makes no shuffle of a loop over a table. It writes the 32 values of a panel's column to
registers, from which the loop over lanes reads them. The loop with a tree of selects took 2.4 times as long as Q4_0's,
this takes as long (64 rows, AVX-512; `docs/FORMATS.md`). Processors without such an instruction read the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.kernel.body import F32

SCALES = (1, 2, 4)  # which make integers of a codebook's values
# {0}: 32 floats; {1}: 16 bytes, whose low halves are the first 16 codes. 32: of signed bytes, in clang's numbering
STATEMENT = """{{
  typedef signed char bytes_at __attribute__((vector_size(16), aligned(1)));
  typedef float floats_at __attribute__((vector_size(64), aligned(4)));
  typedef signed char bytes __attribute__((vector_size(16)));
  typedef float floats __attribute__((vector_size(64)));
  const bytes table = {{%s}};
  const bytes pairs = *(const bytes_at*){1};
  const bytes low = pairs & 15, high = (pairs >> 4) & 15;
#if defined(__SSSE3__)
  const bytes first = __builtin_ia32_pshufb128(table, low), second = __builtin_ia32_pshufb128(table, high);
#elif defined(__aarch64__) && __has_builtin(__builtin_neon_vqtbl1q_v)
  const bytes first = (bytes)__builtin_neon_vqtbl1q_v(table, low, 32);
  const bytes second = (bytes)__builtin_neon_vqtbl1q_v(table, high, 32);
#else
  bytes first, second;
  for (int i = 0; i < 16; i++) {{
    first[i] = table[low[i]];
    second[i] = table[high[i]];
  }}
#endif
  *(floats_at*){0} = __builtin_convertvector(first, floats);
  *((floats_at*){0} + 1) = __builtin_convertvector(second, floats);
}}"""


def integer_codebook(fmt: Format) -> tuple[tuple[int, ...], float] | None:
    """A codebook of 16 signed bytes and what to multiply them by; None if the format has no such codebook."""
    if fmt.codebook is None or fmt.bits != 4:
        return None
    for scale in SCALES:
        scaled = [value * scale for value in fmt.codebook]
        if all(value == int(value) and -128 <= value < 128 for value in scaled):
            return tuple(int(value) for value in scaled), 1 / scale
    return None


@dataclass(frozen=True)
class LookedUp:
    """What the codes of a run stand for: 32 floats in registers, which a statement writes."""

    registers: UOp
    statement: UOp

    def __getitem__(self, lane: UOp) -> UOp:
        # in C, because tinygrad does not order a load of its own after a statement
        return UOp(Ops.CUSTOM, F32, src=(self.registers[lane], self.statement), arg="(*{0})")


def look_up_run(registers: UOp, table: Sequence[int], codes: UOp) -> LookedUp:
    """`codes`: the first of a run's bytes. The statement comes after what `registers`, 32 floats, are after."""
    text = STATEMENT % ", ".join(map(str, table))
    return LookedUp(registers, UOp(Ops.CUSTOM, dtypes.void, src=(registers[0], codes), arg=text))
