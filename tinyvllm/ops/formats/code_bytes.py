"""Reading a quantized run's codes four at a time: words of four unsigned bytes, as the integer instructions of GPUs'
matrix units take them.

Codes of 2 and 4 bits take an instruction or two for four of them, bits from a high plane about five more, and an index
into a codebook of small integers times a power of two about six. What a byte stands for is its `CodeForm`.
"""

from __future__ import annotations

from tinygrad import UOp

from tinyvllm.arrays import Format
from tinyvllm.ops.formats.matrix import PANEL, Planes
from tinyvllm.ops.formats.pairs import byte_table, byte_unit
from tinyvllm.ops.formats.runs import (
    CODEBOOK,
    SIGNED,
    SPREAD,
    CodeForm,
    code_words,
    high_words,
    line,
    packed_bits,
    require_covered,
    shifted_down,
)
from tinyvllm.ops.kernel.lanes import Mma

EVERY = 0x01010101  # the lowest bits of a word's bytes
IN_PLACE = 4  # bits that codes of a run's second half lie higher, if those are all of their bits
WIDTHS = ((2, 0), (4, 0), (8, 0), (2, 1), (4, 1), (4, 2))


def takes_bytes(fmt: Format) -> bool:
    """Whether codes are read as bytes: if they stand for equally spaced values, or for small integers times a unit."""
    if not fmt.is_quantized or fmt.grid is not None or packed_bits(fmt) not in WIDTHS:
        return False
    return line(fmt) is not None or _has_table(fmt)


def byte_forms(fmt: Format) -> tuple[CodeForm, CodeForm]:
    """What the bytes of `read_bytes` stand for: in the first half of a run, and in the second. Codes of up to 4 bits
    without a high plane lie higher in the second half, and stay there."""
    require_covered(fmt)
    known = line(fmt)
    if known is None:
        unit = byte_unit(fmt.codebook or ())
        return CodeForm(unit, unit * SIGNED), CodeForm(unit, unit * SIGNED)
    step, first = known
    return CodeForm(step, -first), CodeForm(step / (1 << IN_PLACE) if _stays(fmt) else step, -first)


def read_bytes(planes: Planes, run: UOp, mma: Mma) -> list[UOp]:
    """A run's codes as words of four neighbors, in the order of the columns."""
    require_covered(planes.fmt)
    fmt, words = planes.fmt, code_words(planes, run)
    width, high_width = packed_bits(fmt)
    if line(fmt) is None:
        found = [mma.look_up(word, byte_table(fmt.codebook or ())) for word in words]
        return [low for low, _ in found] + [high for _, high in found]
    if width == 8:
        return words
    mask, count = ((1 << width) - 1) * EVERY, len(words)
    if _stays(fmt):
        moves = [(i // count * width % IN_PLACE, i // count * width // IN_PLACE * IN_PLACE) for i in range(PANEL // 4)]
        return [shifted_down(words[i % count], down) & mask << place for i, (down, place) in enumerate(moves)]
    low = [shifted_down(words[i % count], i // count * width) & mask for i in range(PANEL // 4)]
    high = high_words(planes, run)
    return [word | _high_bytes(high, i, width, high_width) for i, word in enumerate(low)]


def _stays(fmt: Format) -> bool:
    """Whether codes of a run's second half are read where they lie."""
    width, high_width = packed_bits(fmt)
    return width <= IN_PLACE and not high_width


def _has_table(fmt: Format) -> bool:
    return fmt.codebook is not None and len(fmt.codebook) == CODEBOOK and byte_unit(fmt.codebook) != 0.0


def _high_bytes(high: list[UOp], four: int, target: int, width: int) -> UOp:
    """The bits of four neighboring codes in the high plane, each at bit `target` of its byte. A multiplication moves
    them; copies do not overlap."""
    bit = four * 4 * width
    bits = shifted_down(high[bit // 32], bit % 32) & (1 << 4 * width) - 1
    if width == 2:
        bits = bits * (1 | 1 << 12) & 0x000F000F
        return bits * ((1 | 1 << 6) << target) & EVERY * 3 << target
    return bits * (SPREAD << target) & EVERY << target
