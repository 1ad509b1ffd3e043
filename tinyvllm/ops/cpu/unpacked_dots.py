"""Integer products of many rows of x: a panel's codes are unpacked once for a block of rows (dots.py for few)."""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.cpu.dots import NAMES, Folds, code_words, multiply_parts, run_words
from tinyvllm.ops.cpu.fixed_rows import FixedRows, RowForm
from tinyvllm.ops.formats.dots import WORD, dot_cols
from tinyvllm.ops.formats.matrix import HALF, PANEL, Planes, high_bits, low_bits
from tinyvllm.ops.kernel.body import U32, Body

# {0}: the words, [columns / 2 or 4][32]; {1}: the codes of the chunk; {2}: their high bits; of half of a panel's lanes
UNPACK = f"""{{{{{NAMES}
  enum {{{{ first = 0 }}}};
  for (int run = 0; run < %(runs)d; run++) {{{{
    codes low[16 / LANES]%(high)s;
    UNROLL for (int v = 0; v < 16 / LANES; v++) {{{{
      low[v] = *((const codes_at*){{1}} + run * VECTORS + v);%(load_high)s
    }}}}
    UNROLL for (int i = 0; i < %(words)d; i++)
      UNROLL for (int v = 0; v < 16 / LANES; v++) {{{{
        const words code = %(code)s;
        *((codes_at*){{0}} + (run * %(words)d + i) * VECTORS + v) = (codes)code;
      }}}}
  }}}}
}}}}"""

# {0}: the sums, float32 [rows][32]; {1}: the words; {2}: the scales [groups][32]; {3}: what a group's sum of x is
# multiplied by; then each row's integers of the chunk, and its factors
ADD = f"""{{{{{NAMES}
  typedef float floats __attribute__((vector_size(LANES * 4)));
  typedef floats floats_at __attribute__((aligned(4), may_alias));
  const pair* const x[%(rows)d] = {{{{%(x)s}}}};
  const float* const factors[%(rows)d] = {{{{%(factors)s}}}};
  for (int first = 0; first < VECTORS; first += AT_ONCE) {{{{
    for (int group = 0; group < %(groups)d; group++) {{{{
      ints sums[%(rows)d][AT_ONCE] = {{{{}}}};
      for (int fold = 0; fold < %(folds)d; fold++) {{{{%(pairs)s
      const int start = (group * %(folds)d + fold) * %(words)d;
%(unroll)s
      for (int place = 0; place < %(words)d; place++) {{{{
        codes code[AT_ONCE];
        UNROLL for (int v = 0; v < AT_ONCE; v++)
          code[v] = *((const codes_at*){{1}} + (start + place) * VECTORS + first + v);
        UNROLL for (int r = 0; r < %(rows)d; r++) {{{{
          const pair both = x[r][start + place];
          UNROLL for (int v = 0; v < AT_ONCE; v++) {{{{%(multiply)s
          }}}}
        }}}}
      }}}}%(fold)s
      }}}}
      UNROLL for (int v = 0; v < AT_ONCE; v++) {{{{
        const floats scale = *((const floats_at*){{2}} + group * VECTORS + first + v);%(load_addend)s
        UNROLL for (int r = 0; r < %(rows)d; r++) {{{{
          floats_at* const sum = (floats_at*){{0}} + r * VECTORS + first + v;
          const float unit = factors[r][group * 2];
          *sum += __builtin_convertvector(sums[r][v], floats) * (scale * unit);%(add)s
        }}}}
      }}}}
    }}}}
  }}}}
}}}}"""
# Sixteen products of words are too many to unroll.
UNROLL_FOUR = """#if defined(__clang__)
#pragma clang loop unroll_count(4)
#endif"""
LOAD_ADDEND = "\n        const floats addend = *((const floats_at*){3} + group * VECTORS + first + v);"
ADD_TOTAL = "\n          *sum += addend * factors[r][group * 2 + 1];"


@dataclass(frozen=True)
class UnpackedProduct:
    """A block of rows of x times a panel in the `dot` layout. `tile_rows`: those with sums in registers at once."""

    body: Body
    format: Format
    num_cols: int  # K
    planes: Planes
    panel: UOp
    block: UOp  # of rows of x
    tile_rows: int

    def add(self, acc: UOp, x: FixedRows) -> UOp:
        """The registers `acc` [rows][32], after the product was added to them."""
        body, rows, groups = self.body, self.tile_rows, x.chunk_groups
        chunk = body.fold(self.num_cols // (groups * x.group))
        words = self._unpack(chunk, groups, acc, x.form)
        factors = self._factors(chunk * groups, groups, chunk, words)
        tile = body.fold(x.block_rows // rows)
        places = [x.chunk_place(self.block, chunk, tile * rows + r) for r in range(rows)]
        pointers = [acc.after(chunk)[tile * (rows * PANEL)], words[0], factors[0][0], factors[-1][0]]
        pointers += [x.integers[place * x.form.words] for place in places]
        pointers += [x.factors[place * 2] for place in places]
        statement = add_statement(self.format, x.form, rows, groups, has_addend=len(factors) > 1)
        return acc.after(UOp(Ops.CUSTOM, dtypes.void, src=tuple(pointers), arg=statement).end(tile, chunk))

    def _unpack(self, chunk: UOp, groups: int, acc: UOp, form: RowForm) -> UOp:
        """The words of a chunk's codes."""
        fmt, cols = self.format, groups * self.format.group
        words, half = self.body.registers(cols * form.bits // WORD * PANEL, U32), self.body.loop(2)

        def run(plane: UOp, width: int) -> UOp:
            start = self.panel * (self.num_cols // dot_cols(width)) + chunk * (cols // dot_cols(width))
            return plane[start * PANEL + half * HALF]

        pointers = [words.after(acc, chunk)[half * HALF], run(self.planes.codes, low_bits(fmt))]
        if self.planes.high is not None:
            pointers.append(run(self.planes.high, high_bits(fmt)))
        statement = unpack_statement(fmt, form, cols)
        # in a loop, without whose end tinygrad would leave the statement out
        return words.after(UOp(Ops.CUSTOM, dtypes.void, src=tuple(pointers), arg=statement).end(half))

    def _factors(self, first_group: UOp, groups: int, *after: UOp) -> list[UOp]:
        """The scales [groups][32] of a chunk, and if there are such what sums of x are multiplied by."""
        body, fmt, planes = self.body, self.format, self.planes
        group, lane = body.loop(groups), body.loop(PANEL)

        def factor(name: str) -> UOp:
            return planes.panel_factor(name, self.panel, first_group + group, lane, self.num_cols)

        scale = factor("scale")
        addend = scale * float(-fmt.offset) if fmt.offset else None
        if planes.minimum is not None:
            addend = factor("minimum") if addend is None else addend + factor("minimum")
        arrays, values = [], [scale] if addend is None else [scale, addend]
        for _ in values:
            arrays.append(body.registers(groups * PANEL))
        stores = [
            array.after(*after)[group * PANEL + lane].store(value) for array, value in zip(arrays, values, strict=True)
        ]
        done = UOp.group(*stores).end(lane, group)
        return [array.after(done) for array in arrays]


def unpack_statement(fmt: Format, form: RowForm, num_cols: int) -> str:
    """UNPACK for a format, a form of x's rows, and a number of columns."""
    sizes = {"rows": 1, "folds": 1, "runs": num_cols // dot_cols(low_bits(fmt)), "words": run_words(fmt, form)}
    words = code_words(fmt, form, 2) | {"has_high": "0"}
    return UNPACK % {**sizes, **words, "high": words["high"].replace("AT_ONCE", "16 / LANES")}


def add_statement(fmt: Format, form: RowForm, num_rows: int, num_groups: int, *, has_addend: bool) -> str:
    """ADD for a format, a form of x's rows, their number, and one of groups of columns."""

    def operands(kind: str, first: int) -> str:
        return ", ".join(f"(const {kind}*){{{first + r}}}" for r in range(num_rows))

    folds, parts = Folds.of(fmt, form), multiply_parts(fmt, form, num_rows)
    return ADD % {
        **parts,
        "unroll": parts["unroll"] or UNROLL_FOUR,
        "rows": num_rows,
        "x": operands("pair", 4),
        "factors": operands("float", 4 + num_rows),
        "groups": num_groups,
        "folds": folds.count,
        "words": folds.words,
        "has_high": 0,
        "load_addend": LOAD_ADDEND if has_addend else "",
        "add": ADD_TOTAL if has_addend else "",
    }
