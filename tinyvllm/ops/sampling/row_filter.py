"""How a filter of processed logits is written: a kernel that stores -inf over the ids that a row does not keep.

`FILTERS` in logits_processing.py lists the filters in their order. They run in every step with logits processing,
before the row is sampled; rows that do not ask for a filter only read their settings."""

from __future__ import annotations

from collections.abc import Callable

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.config import MAX_STOP_IDS
from tinyvllm.ops.kernel.body import NEG_INF, Body, KernelFn, cached_kernel, finish
from tinyvllm.ops.sampling.reduction import RowSlice, flag
from tinyvllm.ops.sampling.sample import Row, SampleSpec

IsKept = Callable[[UOp], UOp]  # whether an id with this logit is kept
# (row, its logits, whether they are wanted as int32 0 or 1) -> which ids are kept; 0 makes every pass's length 0
Rule = Callable[[Row, RowSlice, UOp], IsKept]


def filter_kernel(name: str, is_wanted: Callable[[Row], UOp], rule: Rule) -> Callable[[SampleSpec], KernelFn]:
    """A maker of kernels fn(logits, inputs) that store -inf over every id that `rule` does not keep, and over the
    suppressed ids, in rows that want the filter."""

    @cached_kernel
    def make(spec: SampleSpec) -> KernelFn:
        def kernel(logits: UOp, inputs: UOp) -> UOp:
            row = Row(spec, Body(), inputs, num_splits=1, num_threads=spec.row_threads)
            wanted = flag(is_wanted(row))
            ready = logits.after(_suppress(row, logits, wanted))
            values = row.slice(ready)
            stores = _mask_out(row, values, wanted, rule(row, values, wanted))
            end = stores.end(*reversed(row.lanes.axes))
            return finish(end, f"{name}_{spec.num_rows}x{spec.vocab_size}", nbytes=4 * spec.num_rows)

        return kernel

    return make


def _suppress(row: Row, logits: UOp, wanted: UOp) -> UOp:
    """-inf over the suppressed ids, before any thread reads them."""
    thread, width = row.lanes.thread, row.spec.stride
    slot = row.body.fold_while(wanted * MAX_STOP_IDS)
    token = row.suppressed_id(slot.cast(dtypes.weakint))
    is_used = (token >= 0) & (token < row.spec.vocab_size)
    index = row.axis * width + token.maximum(0).minimum(row.spec.vocab_size - 1).cast(dtypes.weakint)
    if thread is not None:
        is_used = is_used & thread.eq(0)
    done = logits.after(*row.lanes.axes)[index.valid(is_used)].store(NEG_INF).end(slot)
    return done if thread is None else UOp(Ops.BARRIER, src=(done,))


def _mask_out(row: Row, values: RowSlice, wanted: UOp, is_kept: IsKept) -> UOp:
    """-inf over the ids that are not kept."""
    lanes = row.lanes
    chunks = max(2, -(-values.span // (lanes.count * lanes.width)))
    chunk = row.body.fold_while(wanted * chunks)
    lane = lanes.thread if lanes.thread is not None else row.body.loop(lanes.count)
    place, stores = chunk.cast(dtypes.weakint) * lanes.count + lane, []
    for item in values.items(place, lanes.width, chunks * lanes.count):
        assert item.at is not None
        stores.append(values.buffer[item.at.valid(item.inside & is_kept(item.value).ne(True))].store(NEG_INF))
    done = UOp.group(*stores)
    return done.end(chunk) if lanes.thread is not None else done.end(lane, chunk)
