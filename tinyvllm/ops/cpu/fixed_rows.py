"""Rows of x as integers for products with quantized matrices: x = integer * unit, a unit for each group of columns.

Blocks of up to 64 rows are contiguous, and in them the rows of a chunk of columns. A product reads a block again for
each panel of its matrix: from the second level of the cache, and a chunk from the first. (With whole rows one after
another, rows of 2,048 columns are 4 KiB apart, and 64 of them share 8 of the 64 sets of the first level.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.device.recording import MOST_BLOCKS, Share
from tinyvllm.ops.cpu.product import NormSpec, Shard, rms_scale, take_shards
from tinyvllm.ops.formats.dots import HALF_WORD, dot_cols
from tinyvllm.ops.formats.matrix import low_bits
from tinyvllm.ops.kernel.body import F32, I32, Body, KernelFn, cached_kernel, finish, run_kernel, run_row_kernel

LEAST_PEAK = 0x0DA24260  # the bits of 1e-30: of smaller values, 32767 / value could be infinite
BLOCK_ROWS = 64  # at most, of a block
CHUNK_COLS = 256  # at most, of a chunk
VECTOR = 8  # floats of the statement's vectors
# Rounds a group of columns. {0}: the bits of the largest absolute value, and the sum of the integers; {1}: their words;
# {2}: the floats. In C: tinygrad's loops, with their results in memory, took 1.9 times as long.
STATEMENT = """{{
  typedef float floats __attribute__((vector_size(32)));
  typedef int ints __attribute__((vector_size(32)));
  typedef floats floats_at __attribute__((aligned(4), may_alias));
  typedef short words __attribute__((vector_size(16)));
  typedef words words_at __attribute__((aligned(2), may_alias));
  const floats_at* const x = (const floats_at*){2};
  ints peaks = (ints){{}} + %(least)d, sums = {{}};
  for (int i = 0; i < %(vectors)d; i++) {{
    const ints bits = (ints)x[i] & 0x7FFFFFFF, is_more = bits > peaks;
    peaks = (bits & is_more) | (peaks & ~is_more);
  }}
  int peak = peaks[0];
  for (int i = 1; i < 8; i++) peak = peaks[i] > peak ? peaks[i] : peak;
  const float factor = %(largest)d.0f / __builtin_bit_cast(float, peak);
  ints integers[%(vectors)d];
  for (int i = 0; i < %(vectors)d; i++) {{
    // positive, so that truncation rounds to nearest
    integers[i] = __builtin_convertvector(x[i] * factor + (%(largest)d + 1.5f), ints) - (%(largest)d + 1);
    sums += integers[i];
  }}
  %(store)s
  int sum = 0;
  for (int i = 0; i < 8; i++) sum += sums[i];
  *({0} + 0) = peak;
  *({0} + 1) = sum;
}}"""


def rows_of_block(num_rows: int) -> int:
    """Rows of a block: a divisor of `num_rows`, of which as many as possible are computed at a time."""
    at_once = next(n for n in (4, 2, 1) if num_rows % n == 0)
    return next(n for n in range(min(num_rows, BLOCK_ROWS), 0, -1) if num_rows % n == 0 and n % at_once == 0)


def run_in_blocks(
    make: Callable[[int], KernelFn],
    num_rows: int,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    shared: Sequence[Tensor],
    share: Share | None = None,
) -> list[Tensor]:
    """`run_kernel` for `make(num_rows)`, whose work items are blocks of rounded rows. In recorded steps of any number
    of whole blocks it is one program. `shared`: the tensors whose size does not depend on the number of rows."""
    if rows_of_block(num_rows) != BLOCK_ROWS:
        return run_kernel(make(num_rows), outputs, inputs, share)
    num_blocks = num_rows // BLOCK_ROWS

    def of_blocks(count: int) -> KernelFn:
        return make(count * BLOCK_ROWS)

    return run_row_kernel(of_blocks, num_blocks, outputs, inputs, shared, MOST_BLOCKS, share)


def groups_of_chunk(num_cols: int, group: int) -> int:
    """Groups of a chunk, of which a row of `num_cols` has a whole number."""
    groups = num_cols // group
    return next(n for n in range(max(1, CHUNK_COLS // group), 0, -1) if groups % n == 0)


@dataclass(frozen=True)
class RowForm:
    """How rows of x are rounded. In 8 bits, two columns that are half a `run` apart share a word of 16 bits: the order
    in which one shift and one mask give four codes of a word of the `dot` layout."""

    bits: int  # 16 or 8
    group: int  # columns that share a unit
    run: int = 0

    @classmethod
    def of(cls, fmt: Format, bits: int) -> RowForm:
        """For products with a format. Its codes of 8 bits are multiplied with 16: the products of two pairs of bytes
        exceed the 16 bits of their sum."""
        is_wide = bits == 16 or fmt.bits == 8
        return cls(16, fmt.group) if is_wide else cls(8, fmt.group, dot_cols(low_bits(fmt)))

    @property
    def largest(self) -> int:
        """The largest integer."""
        return (1 << self.bits - 1) - 1

    @property
    def words(self) -> int:
        """Words of 16 bits of a group."""
        return self.group * self.bits // HALF_WORD


@dataclass(frozen=True)
class FixedRows:
    """Rows of x as integers: (blocks, chunks, rows of a block, groups of a chunk, ...)."""

    integers: UOp  # int16 (..., words of a group)
    factors: UOp  # float32 (..., 2): the unit, and the group's sum of x
    num_rows: int  # T
    num_cols: int  # K
    form: RowForm

    @property
    def group(self) -> int:
        return self.form.group

    @property
    def block_rows(self) -> int:
        return rows_of_block(self.num_rows)

    @property
    def chunk_groups(self) -> int:
        return groups_of_chunk(self.num_cols, self.group)

    def place(self, row: UOp, group: UOp) -> UOp:
        """The index of a row's group among all groups."""
        rows, groups = self.block_rows, self.chunk_groups
        return self.chunk_place(row // rows, group // groups, row % rows) + group % groups

    def chunk_place(self, block: UOp, chunk: UOp, row: UOp) -> UOp:
        """The index of the first group of a chunk of a block's row."""
        rows, groups = self.block_rows, self.chunk_groups
        return (block * (self.num_cols // self.group // groups) + chunk) * (rows * groups) + row * groups

    def factor(self, row: UOp, group: UOp, which: int) -> UOp:
        return self.factors[self.place(row, group) * 2 + which].load()


def fix_row(body: Body, at: Callable[[UOp], UOp], row: UOp, rows: FixedRows) -> UOp:
    """The stores that round a row of x, whose column c lies at the place at(c) and a group's columns side by side, to
    row `row` of `rows`. A group with a value that is not finite gets such a unit."""
    form = rows.form
    index = body.loop(rows.num_cols // form.group)
    found, words = body.registers(2, I32), body.registers(form.words, dtypes.short)
    pointers = (found.after(row, index)[0], words.after(row, index)[0], at(index * form.group))
    statement = UOp(Ops.CUSTOM, dtypes.void, src=pointers, arg=_statement(form))

    def read(place: UOp, dtype: DType) -> UOp:
        # in C, because tinygrad does not order a load of its own after a statement
        return UOp(Ops.CUSTOM, dtype, src=(place, statement), arg="(*{0})")

    place, k = rows.place(row, index), body.loop(form.words)
    stored = rows.integers[place * form.words + k].store(read(words[k], dtypes.short)).end(k)
    unit = read(found[0], I32).bitcast(F32) * (1.0 / form.largest)
    target = rows.factors.after(stored)
    stores = [target[place * 2].store(unit), target[place * 2 + 1].store(unit * read(found[1], I32).cast(F32))]
    return UOp.group(*stores).end(index)


def _statement(form: RowForm) -> str:
    """STATEMENT for a form of rows."""
    stores = [f"*((words_at*){{1}} + {i}) = __builtin_convertvector({word}, words);" for i, word in _words(form)]
    numbers = {"vectors": form.group // VECTOR, "least": LEAST_PEAK, "largest": form.largest}
    return STATEMENT % {**numbers, "store": "\n  ".join(stores)}


def _words(form: RowForm) -> Iterator[tuple[int, str]]:
    """The vectors of a group's words: in 8 bits each of an integer and the one half a run after it."""
    half = form.run // 2
    for i in range(form.words // VECTOR):
        low = f"integers[{i}]"
        if not half:
            yield i, low
            continue
        if half >= VECTOR:
            first = (i * VECTOR // half * form.run + i * VECTOR % half) // VECTOR
            low, high = f"integers[{first}]", f"integers[{first + half // VECTOR}]"
        else:  # two runs of a vector each
            both = f"__builtin_shufflevector(integers[{2 * i}], integers[{2 * i + 1}], "
            low, high = f"{both}0, 1, 2, 3, 8, 9, 10, 11)", f"{both}4, 5, 6, 7, 12, 13, 14, 15)"
        yield i, f"({low} & 0xFF) | {high} << 8"


def fix_rows(body: Body, x: Shard, num_tokens: int, form: RowForm) -> FixedRows:
    """x (T, K) rounded, on the kernel's stack."""
    count = num_tokens * x.width // form.group
    integers, factors = body.registers(count * form.words, dtypes.short), body.registers(count * 2)
    row = body.loop(num_tokens)
    rows = FixedRows(integers.after(x.buffer), factors, num_tokens, x.width, form)
    done = fix_row(body, lambda col: x.buffer[x.at(row, col)], row, rows).end(row)
    return replace(rows, integers=integers.after(done), factors=factors.after(done))


@cached_kernel
def fix_rows_kernel(spec: NormSpec, form: RowForm, normed: bool) -> KernelFn:
    """fn(integers, factors, *x shards[, norm weight]): FixedRows of x (T, K) or of its norm."""

    def kernel(integers: UOp, factors: UOp, *rest: UOp) -> UOp:
        body, cols, operands = Body(), spec.num_cols, list(rest)
        x = take_shards(operands, spec.x_cols, cols)
        rows_each = rows_of_block(spec.num_tokens)
        num_blocks = spec.num_tokens // rows_each
        block, place = body.grid(num_blocks), body.loop(rows_each)
        # clang cannot know the range of a work item's number: without the mask, norms take 1.3 times as long
        bounded = block & (MOST_BLOCKS - 1) if num_blocks <= MOST_BLOCKS else block
        row = bounded * rows_each + place
        scale = rms_scale(body, x, row, spec) if normed else None
        staged, copies = body.registers(cols), []
        for shard in x:
            col = body.loop(shard.width)
            value = shard.buffer[shard.at(row, col)].load()
            if scale is not None:
                value = value * scale[0] * operands[0][shard.start + col]
            copies.append(staged.after(row)[shard.start + col].store(value).end(col))
        done = staged.after(UOp.group(*copies))
        rows = FixedRows(integers, factors, spec.num_tokens, cols, form)
        stores = fix_row(body, lambda col: done[col], row, rows).end(place, block)
        size = spec.num_tokens * cols
        kind = "fixed" if form.bits == 16 else f"fixed{form.bits}"
        name = f"{'norm_' if normed else ''}{kind}_{spec.num_tokens}x{cols}_{form.group}"
        return finish(stores, name, ops=6 * size, nbytes=6 * size)

    return kernel
