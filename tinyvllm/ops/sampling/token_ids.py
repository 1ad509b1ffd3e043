"""The token ids of a step's rows: given by the host, or left by the step before in its output."""

from __future__ import annotations

from tinygrad import UOp

from tinyvllm.ops.kernel.body import clamp
from tinyvllm.ops.sampling.sample import OUT_TOKEN, OUT_WIDTH


def token_id(word: UOp, newest: UOp | None, num_rows: int) -> UOp:
    """The row of the embedding table, in [0, num_rows), that a word of the step's `token_ids` asks for.

    A word below 0 stands for row -1 - word of `newest`, (rows * OUT_WIDTH,) int32, the output of the step before."""
    if newest is not None:
        row = clamp(word * -1 - 1, 0, newest.max_numel() // OUT_WIDTH - 1)
        word = (word < 0).where(newest[row * OUT_WIDTH + OUT_TOKEN].load(), word)
    return clamp(word, 0, num_rows - 1)
