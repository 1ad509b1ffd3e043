"""Codebooks of 16 values in the CPU's products: a shuffle looks up 16 codes at once.

A statement in C, because clang makes no shuffle of a loop over a table. It writes the 32 values of a panel's column to
registers, from which the loop over lanes reads them. Small integers are looked up as bytes (x86, ARM), other values as
floats (AVX-512); processors without such an instruction read the table. A tree of selects in the loop over lanes took
2.4 times as long as Q4_0's integers do; bytes take as long as these (64 rows, AVX-512; `docs/FORMATS.md`).
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.kernel.body import F32

SCALES = (1, 2, 4)  # which make integers of a codebook's values
# {0}: 32 floats; {1}: 16 bytes, whose low halves are the first 16 codes
STATEMENT = """{{
  typedef signed char bytes_at __attribute__((vector_size(16), aligned(1)));
  typedef float floats_at __attribute__((vector_size(64), aligned(4)));
  typedef signed char bytes __attribute__((vector_size(16)));
  typedef float floats __attribute__((vector_size(64)));
  const bytes pairs = *(const bytes_at*){1};
  const bytes low = pairs & 15, high = (pairs >> 4) & 15;
%s
  *(floats_at*){0} = %s;
  *((floats_at*){0} + 1) = %s;
}}"""
# 32: of signed bytes, in clang's numbering
BYTES = """  const bytes table = {{%s}};
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
#endif"""
FLOATS = """  const floats table = {{%s}};
#if defined(__AVX512F__)
  typedef int ints __attribute__((vector_size(64)));
  const floats first = __builtin_ia32_permvarsf512(table, __builtin_convertvector(low, ints));
  const floats second = __builtin_ia32_permvarsf512(table, __builtin_convertvector(high, ints));
#else
  floats first, second;
  for (int i = 0; i < 16; i++) {{
    first[i] = table[low[i]];
    second[i] = table[high[i]];
  }}
#endif"""
TO_FLOATS = "__builtin_convertvector(%s, floats)"


@dataclass(frozen=True)
class Lookup:
    """How the codes of a format are looked up, and what to multiply the found values by."""

    text: str  # the statement
    unit: float


@dataclass(frozen=True)
class LookedUp:
    """What the codes of a run stand for: 32 floats in registers, which a statement writes."""

    registers: UOp
    statement: UOp

    def __getitem__(self, lane: UOp) -> UOp:
        # in C, because tinygrad does not order a load of its own after a statement
        return UOp(Ops.CUSTOM, F32, src=(self.registers[lane], self.statement), arg="(*{0})")


def lookup_of(fmt: Format) -> Lookup | None:
    """None if the format has no codebook of 16 values."""
    if fmt.codebook is None or fmt.bits != 4:
        return None
    for scale in SCALES:
        scaled = [value * scale for value in fmt.codebook]
        if all(value == int(value) and -128 <= value < 128 for value in scaled):
            table = BYTES % ", ".join(str(int(value)) for value in scaled)
            return Lookup(STATEMENT % (table, TO_FLOATS % "first", TO_FLOATS % "second"), 1 / scale)
    table = FLOATS % ", ".join(f"{value.hex()}f" for value in fmt.codebook)
    return Lookup(STATEMENT % (table, "first", "second"), 1.0)


def look_up_run(registers: UOp, lookup: Lookup, codes: UOp) -> LookedUp:
    """`codes`: the first of a run's bytes. The statement comes after what `registers`, 32 floats, are after."""
    return LookedUp(registers, UOp(Ops.CUSTOM, dtypes.void, src=(registers[0], codes), arg=lookup.text))
