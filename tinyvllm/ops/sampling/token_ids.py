"""The token ids of a step's rows: given by the host, or read from the output of the previous step."""

from __future__ import annotations

from tinygrad import UOp

from tinyvllm.ops.kernel.body import clamp
from tinyvllm.ops.sampling.sample import OUT_TOKEN, OUT_WIDTH


def token_id(word: UOp, previous_output: UOp | None, num_rows: int) -> UOp:
    """The row of the embedding table, in [0, num_rows), for a word of the step's `token_ids`.

    A negative word names row -1 - word of `previous_output`, (rows * OUT_WIDTH,) int32, the output of the previous
    step."""
    if previous_output is not None:
        row = clamp(word * -1 - 1, 0, previous_output.max_numel() // OUT_WIDTH - 1)
        word = (word < 0).where(previous_output[row * OUT_WIDTH + OUT_TOKEN].load(), word)
    return clamp(word, 0, num_rows - 1)
