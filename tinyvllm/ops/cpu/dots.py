"""Products of quantized matrices by integer dot products, on x86: rows of x as integers against codes as they are.

Each group of x's columns is rounded to multiples of its largest value / 32767 (fixed_rows.py). The integers' products
with the codes of a group are summed exactly, and the sum is scaled once. An instruction multiplies twice as many pairs
of 16-bit integers as floats (`vpmaddwd`; `vpdpwssd` adds as well), and unpacking a vector of codes takes one shift and
one mask instead of a conversion for each. The rounding is at most 1.6e-5 of a group's largest value. That is an eighth
of what rounding to float16 does to such a value, as every GPU does, and 256 times less than 8-bit activations have
(llama.cpp's Q8). Those are an option: an instruction multiplies twice as many pairs of bytes (`vpmaddubsw`, whose sums
have 16 bits and are folded into 32 before they can overflow; `vpdpbusd`).

One core of a Xeon took 45 % of the float kernels' time for 64 rows of Q4_1 with AVX-512 and VNNI, and 56 % with AVX2;
for one row from memory 41 and 49 %. One core of an EPYC with AVX2 multiplies 256 rows of Q4_K at 104 GFLOP/s with 16
bits of x, and at 205 with 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.cpu.fixed_rows import FixedRows, RowForm
from tinyvllm.ops.formats.dots import HALF_WORD, WORD, dot_cols
from tinyvllm.ops.formats.matrix import PANEL, Planes, high_bits, low_bits
from tinyvllm.ops.kernel.body import F32, I32, Body

# Rows of x in a pass over a panel. Of many rows, two or eight took up to a tenth longer than four, whatever the
# registers. Of a few rows, as those that verify drafts, eight take 20 % less than two passes of four, if there are
# registers for their sums.
DOT_ROWS, FEW_DOT_ROWS = 4, 8
MOST_FOLDED = 8  # words of bytes whose products are added up before they are folded: these loops are unrolled

# The names of a statement: AT_ONCE vectors of a panel's 32 lanes have their sums in registers at a time, fewer if HIGH:
# vectors of the codes' high bits are in registers beside those of the low ones. SUMS_PAIRS: bytes are multiplied by an
# instruction whose results, sums of two products, have 16 bits.
NAMES = """
#if defined(__AVX512BW__)
  enum {{ LANES = 16 }};
#else
  enum {{ LANES = 8 }};
#endif
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) || defined(__AVXVNNI__) || !defined(__AVX2__)
#define SUMS_PAIRS 0
#else
#define SUMS_PAIRS 1
#endif
  enum {{ VECTORS = 32 / LANES, FEW = SUMS_PAIRS && %(folds)d > 1, HIGH = %(has_high)s }};
  enum {{ AT_ONCE = LANES == 16 ? VECTORS
      : HIGH ? 2 - (%(rows)d > 3 - 2 * FEW) : %(rows)d > 2 ? 2 - FEW : VECTORS / (1 + FEW) }};
  typedef int ints __attribute__((vector_size(LANES * 4)));
  typedef short words __attribute__((vector_size(LANES * 4)));
  typedef unsigned short codes __attribute__((vector_size(LANES * 4)));
  typedef ints ints_at __attribute__((aligned(4), may_alias));
  typedef codes codes_at __attribute__((aligned(4), may_alias));
  typedef int pair __attribute__((aligned(2), may_alias));"""

# By the bits of x: sums[r][v] += the products of the words code[v] with two integers of row r, or with four. AVX2's two
# instructions are one statement, because clang would reorder the additions, and then spill sums. Where there is no such
# instruction, plain C says the same.
MULTIPLY = {
    16: """
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
            __asm__("vpdpwssd %%2%%{{1to16%%}}, %%1, %%0" : "+v"(sums[r][v]) : "v"(code[v]), "m"(both));
#elif defined(__AVXVNNI__)
            const ints same = (ints){{}} + both;
            __asm__("%%{{vex%%}} vpdpwssd %%2, %%1, %%0" : "+x"(sums[r][v]) : "x"(code[v]), "x"(same));
#elif defined(__AVX2__)
            const ints same = (ints){{}} + both;
            ints product;
            __asm__("vpmaddwd %%3, %%2, %%1\\n\\tvpaddd %%1, %%0, %%0"
                    : "+v"(sums[r][v]), "=&v"(product) : "v"(code[v]), "v"(same));
#else
            sums[r][v] += ((ints)code[v] << 16 >> 16) * (both << 16 >> 16) + ((ints)code[v] >> 16) * (both >> 16);
#endif""",
    8: """
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
            __asm__("vpdpbusd %%2%%{{1to16%%}}, %%1, %%0" : "+v"(sums[r][v]) : "v"(code[v]), "m"(both));
#elif defined(__AVXVNNI__)
            const ints same = (ints){{}} + both;
            __asm__("%%{{vex%%}} vpdpbusd %%2, %%1, %%0" : "+x"(sums[r][v]) : "x"(code[v]), "x"(same));
#elif SUMS_PAIRS
            const ints same = (ints){{}} + both;
            if (place == 0) {{
              __asm__("vpmaddubsw %%2, %%1, %%0" : "=v"(pairs[r][v]) : "v"(code[v]), "v"(same));
            }} else {{
              ints product;
              __asm__("vpmaddubsw %%3, %%2, %%1\\n\\tvpaddw %%1, %%0, %%0"
                      : "+v"(pairs[r][v]), "=&v"(product) : "v"(code[v]), "v"(same));
            }}
#else
            const ints four = (ints)code[v];
            sums[r][v] += (four & 255) * (both << 24 >> 24) + (four >> 8 & 255) * (both << 16 >> 24)
                + (four >> 16 & 255) * (both << 8 >> 24) + (four >> 24) * (both >> 24);
#endif""",
}

# Before and after as many products with bytes as 16 bits can sum.
PAIRS = """
#if SUMS_PAIRS
      ints pairs[%(rows)d][AT_ONCE];
#endif"""
FOLD = """
#if SUMS_PAIRS
      UNROLL for (int r = 0; r < %(rows)d; r++)
        UNROLL for (int v = 0; v < AT_ONCE; v++) {{
          ints sum;
          __asm__("vpmaddwd %%2, %%1, %%0" : "=v"(sum) : "v"(pairs[r][v]), "v"((ints){{}} + 0x10001));
          sums[r][v] += sum;
        }}
#endif"""

# A core that reads codes once is limited by memory. Processors fetch ahead within a page only: with these requests Q4_1
# at one row came at 15 GB/s instead of 10, which is what one core read without any arithmetic.
AHEAD = 6144  # bytes
PREFETCH = f"""
      __builtin_prefetch((const char*){{1}} + run * 128 + {AHEAD});
      __builtin_prefetch((const char*){{1}} + run * 128 + {AHEAD + 64});"""

# {0}: the sums, int32 [rows][32]; {1}: the codes of the panel's group; then each row's integers of the group, and the
# codes' high bits
STATEMENT = f"""{{{{{NAMES}
  const pair* const x[%(rows)d] = {{{{%(x)s}}}};
  for (int first = 0; first < VECTORS; first += AT_ONCE) {{{{
    ints sums[%(rows)d][AT_ONCE] = {{{{}}}};
    for (int fold = 0; fold < %(folds)d; fold++) {{{{%(pairs)s
    %(unroll)s for (int at = 0; at < %(fold_runs)d; at++) {{{{
      const int run = fold * %(fold_runs)d + at;
      codes low[AT_ONCE]%(high)s;{PREFETCH}
      UNROLL for (int v = 0; v < AT_ONCE; v++) {{{{
        low[v] = *((const codes_at*){{1}} + run * VECTORS + first + v);%(load_high)s
      }}}}
      UNROLL for (int i = 0; i < %(words)d; i++) {{{{
        const int place = at * %(words)d + i;
        words code[AT_ONCE];
        UNROLL for (int v = 0; v < AT_ONCE; v++) code[v] = %(code)s;
        UNROLL for (int r = 0; r < %(rows)d; r++) {{{{
          const pair both = x[r][fold * (%(fold_runs)d * %(words)d) + place];
          UNROLL for (int v = 0; v < AT_ONCE; v++) {{{{%(multiply)s
          }}}}
        }}}}
      }}}}
    }}}}%(fold)s
    }}}}
    UNROLL for (int r = 0; r < %(rows)d; r++)
      UNROLL for (int v = 0; v < AT_ONCE; v++) *((ints_at*){{0}} + r * VECTORS + first + v) = sums[r][v];
  }}}}
}}}}"""


@dataclass(frozen=True)
class DotProduct:
    """All rows of x, which are few, times a panel in the `dot` layout: 32 sums for each row."""

    body: Body
    format: Format
    num_cols: int  # K
    planes: Planes
    panel: UOp
    rows: Sequence[UOp]  # of x

    def add(self, acc: UOp, x: FixedRows) -> UOp:
        """The registers `acc` [rows][32], after the product was added to them."""
        group = self.body.fold(self.num_cols // x.group)
        sums = self.body.registers(len(self.rows) * PANEL, I32)
        statement = self._sum(sums.after(acc, group), x, group)
        return acc.after(self._add_scaled(acc.after(group), sums, statement, x, group))

    def _sum(self, sums: UOp, x: FixedRows, group: UOp) -> UOp:
        """The statement that writes a group's sums of integers."""
        fmt, planes, cols = self.format, self.planes, self.num_cols

        def run(plane: UOp, width: int) -> UOp:
            return plane[(self.panel * (cols // dot_cols(width)) + group * (x.group // dot_cols(width))) * PANEL]

        pointers = [sums[0], run(planes.codes, low_bits(fmt))]
        pointers += [x.integers[x.place(row, group) * x.form.words] for row in self.rows]
        if planes.high is not None:
            pointers.append(run(planes.high, high_bits(fmt)))
        return UOp(Ops.CUSTOM, dtypes.void, src=tuple(pointers), arg=_statement(fmt, x.form, len(self.rows)))

    def _add_scaled(self, acc: UOp, sums: UOp, statement: UOp, x: FixedRows, group: UOp) -> UOp:
        """acc += scale * (unit * sum - offset * total) + minimum * total; ends the loop `group`."""
        fmt, lane = self.format, self.body.loop(PANEL)
        scale = self.planes.panel_factor("scale", self.panel, group, lane, self.num_cols)
        of_total = scale * float(-fmt.offset) if fmt.offset else None
        if self.planes.minimum is not None:
            minimum = self.planes.panel_factor("minimum", self.panel, group, lane, self.num_cols)
            of_total = minimum if of_total is None else of_total + minimum
        stores = []
        for r, row in enumerate(self.rows):
            at = r * PANEL + lane
            # in C, because tinygrad does not order a load of its own after a statement, and would multiply in another
            # order than the statement of many rows (unpacked_dots.py), so that a row would depend on its neighbors
            operands = (sums[at], statement, scale, x.factor(row, group, 0), acc[at].load())
            value = UOp(Ops.CUSTOM, F32, src=operands, arg="({4} + (float)(*{0}) * ({2} * {3}))")
            if of_total is not None:
                total = x.factor(row, group, 1)
                value = UOp(Ops.CUSTOM, F32, src=(value, of_total, total), arg="({0} + ({1}) * {2})")
            stores.append(acc[at].store(value))
        return UOp.group(*stores).end(lane, group)


@dataclass(frozen=True)
class Folds:
    """How a group's products are added up: `count` times those of `words` words of codes."""

    count: int
    words: int

    @classmethod
    def of(cls, fmt: Format, form: RowForm) -> Folds:
        """Of 16-bit integers, and where the processor adds up bytes' products in 32 bits, all at once."""
        if form.bits == 16:
            return cls(1, form.group // 2)
        most = 32767 // (2 * form.largest * ((1 << fmt.bits) - 1))
        words = min(1 << most.bit_length() - 1, MOST_FOLDED, form.group // 4)
        return cls(form.group // 4 // words, words)


def code_words(fmt: Format, form: RowForm, high_plane: int) -> dict[str, str]:
    """How a statement unpacks a vector of codes: `code`, the i-th words of a run, from low[v] and high[v]; `high`, the
    declaration of `high`, and `load_high`, its loads from the operand `high_plane`."""
    low, high = low_bits(fmt), high_bits(fmt)
    mask, high_mask = (1 << low) - 1, (1 << high) - 1
    if fmt.bits == 8:
        code = "i == 0 ? (words)(low[v] << 8) >> 8 : (words)low[v] >> 8"
    else:
        code = f"(words)((low[v] >> {low} * i) & {mask if form.bits == 16 else mask * 0x101})"
    load_high = ""
    if high:
        runs = dot_cols(high) // dot_cols(low)  # of the low plane for one of the high plane
        place = f"run % {runs} * {HALF_WORD // low * high}"
        word = f"*((const codes_at*){{{high_plane}}} + run / {runs} * VECTORS + first + v)"
        load_high = f"\n      high[v] = {word} >> ({place});"
        code = f"{code} | (words)(((high[v] >> {high} * i) & {high_mask}) << {low})"
        if form.bits == 8:
            code += f" | (words)(((high[v] >> {high} * (i + {run_words(fmt, form)})) & {high_mask}) << {low + 8})"
    return {"code": code, "high": ", high[AT_ONCE]" if high else "", "load_high": load_high}


def run_words(fmt: Format, form: RowForm) -> int:
    """Words that a statement makes of a run's word: of two codes, or of four."""
    return dot_cols(low_bits(fmt)) * form.bits // WORD


def multiply_parts(fmt: Format, form: RowForm, num_rows: int) -> dict[str, str]:
    """The parts of a statement that depend on the integers' bits."""
    if form.bits == 16:
        return {"multiply": MULTIPLY[16] % {}, "pairs": "", "fold": "", "unroll": ""}
    rows = {"rows": num_rows}
    return {"multiply": MULTIPLY[8] % {}, "pairs": PAIRS % rows, "fold": FOLD % rows, "unroll": "UNROLL"}


def _statement(fmt: Format, form: RowForm, num_rows: int) -> str:
    """STATEMENT for a format, a form of x's rows, and their number."""
    words, folds, parts = run_words(fmt, form), Folds.of(fmt, form), multiply_parts(fmt, form, num_rows)
    if high_bits(fmt):  # 2 to 10 % less time; low bits alone take as long or longer
        parts["unroll"] = "UNROLL"
    return STATEMENT % {
        "rows": num_rows,
        "x": ", ".join(f"(const pair*){{{2 + r}}}" for r in range(num_rows)),
        "folds": folds.count,
        "fold_runs": folds.words // words,
        "words": words,
        "has_high": int(high_bits(fmt) > 0),
        **parts,
        **code_words(fmt, form, 2 + num_rows),
    }
