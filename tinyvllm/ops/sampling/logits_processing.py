"""Logits processing, before a token is sampled: allowed ids, logit bias, penalties, typical-p.

A step in which no row asks for any of these runs `sample.sample` alone. Any other step keeps the raw logits, from which
logprobs are reported, and samples from a processed copy. The order is vLLM's
(github.com/vllm-project/vllm/blob/3e342658b2e9c85a30a54d19e64e5ad77b8a26a6/vllm/v1/sample/sampler.py, class Sampler):

1. logprobs and ranks of the raw logits
2. ids that are not allowed (allowed_token_ids, a grammar, bad words) and ids that min_tokens suppresses: -inf
3. logit bias: added
4. repetition penalty r, for ids of prompt and output: logit / r if it is positive, else logit * r (Keskar et al. 2019,
   sec. 4.1); then minus frequency_penalty * (count of the id in the output), minus presence_penalty if the count is > 0
5. temperature, min-p, top-k, top-p, typical-p, the draw

What a request needs for this stays on the device, in a row of the sampling state that the request has while it runs.
Only a mask that changed is sent for a step. The step itself counts the tokens that it samples.

A request with drafts has several rows in a step. Each counts the drafts before its token as if they were in the output
already, and has a mask of its own if the mask depends on them. Of the tokens sampled, those are counted that follow
right drafts: the others are not the request's.

counts (S, V) uint16: how often the id was generated (at most 32767); bit 15 is set if it is in the prompt
mask (S, W) uint32: bit i % 32 of word i // 32 is set if id i is allowed
bias (S, 2 * MAX_LOGIT_BIAS) int32: ids, then the bits of the floats to add
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tinygrad import Tensor, UOp, dtypes

from tinyvllm.config import MAX_LOGIT_BIAS, MAX_SPECULATIVE_TOKENS
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.row_writer import row_writer
from tinyvllm.ops.kernel.body import (
    F32,
    I32,
    NEG_INF,
    U16,
    U32,
    Body,
    KernelFn,
    cached_kernel,
    empty,
    fill,
    finish,
    run_row_kernel,
)
from tinyvllm.ops.sampling.sample import (
    OUT_TOKEN,
    OUT_WIDTH,
    LeadersSpec,
    SampleSpec,
    draw_kernel,
    find_leaders,
    row_slice,
)
from tinyvllm.ops.sampling.typical import typical_kernel
from tinyvllm.ops.step_inputs import row_word

WORD = 32  # ids per word of a mask
THREADS = 256  # threads of a threadgroup that processes logits
MAX_COUNT = 0x7FFF
IN_PROMPT = 0x8000
FILTERS = (typical_kernel,)  # kernels of processed logits, in their order: see row_filter.py


class SamplingState:
    """Owns the sampling state on the device. The host writes its rows while no step reads them."""

    def __init__(self, device: DeviceHandle, num_rows: int, vocab_size: int) -> None:
        self.num_rows, self.vocab_size = num_rows, vocab_size
        words = mask_words(vocab_size)
        self.counts = device.zeros(num_rows * words * WORD, U16)  # rows padded like the mask's
        self.mask = device.zeros(num_rows * words, U32)
        self.bias = device.zeros(num_rows * 2 * MAX_LOGIT_BIAS, I32)
        self._write_counts = row_writer(self.counts, words * WORD)
        self._write_mask = row_writer(self.mask, words)
        self._write_bias = row_writer(self.bias, 2 * MAX_LOGIT_BIAS)

    def __getstate__(self) -> dict[str, object]:
        """Without the writers: a process that traces steps writes no rows."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_write")}

    def write_counts(self, row: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Replace a row's counts by those of a request's tokens."""
        counts = np.zeros(mask_words(self.vocab_size) * WORD, np.uint16)
        ids, times = np.unique(np.asarray(output_ids, np.int64), return_counts=True)
        counts[ids] = np.minimum(times, MAX_COUNT)
        counts[np.asarray(prompt_ids, np.int64)] |= IN_PROMPT
        self._write_counts(row, counts)

    def write_mask(self, row: int, words: np.ndarray) -> None:
        """Set the allowed ids. words (W,) uint32."""
        self._write_mask(row, words)

    def write_bias(self, row: int, bias: Mapping[int, float]) -> None:
        """Set the bias of at most MAX_LOGIT_BIAS ids. The step's `num_bias` says how many there are."""
        words = np.zeros(2 * MAX_LOGIT_BIAS, np.int32)
        words[: len(bias)] = list(bias)
        words[MAX_LOGIT_BIAS : MAX_LOGIT_BIAS + len(bias)] = np.array(list(bias.values()), np.float32).view(np.int32)
        self._write_bias(row, words)


def mask_words(vocab_size: int) -> int:
    """W: the words of a mask over a vocabulary."""
    return -(-vocab_size // WORD)


def state_bytes(num_rows: int, vocab_size: int) -> int:
    """The size of a SamplingState: 2.13 bytes per id plus 8 KiB, for each row; 4.3 MiB for 16 rows of 128,256 ids."""
    words = mask_words(vocab_size)
    return num_rows * (2 * words * WORD + 4 * words + 8 * MAX_LOGIT_BIAS)


@dataclass(frozen=True)
class ProcessingSpec:
    """A step's logits and a state of S rows."""

    sample: SampleSpec
    num_rows: int  # S
    has_drafts: bool = False  # as in StepLayout

    @property
    def words(self) -> int:
        return mask_words(self.sample.vocab_size)


def sample_processed(
    spec: SampleSpec, logits: Tensor, inputs: Tensor, state: SamplingState, out: Tensor | None = None
) -> Tensor:
    """(R * OUT_WIDTH,) int32, like `sample`. Counts the sampled tokens in the state; does not change the logits."""
    seqs, device = spec.num_rows, str(inputs.device)
    raw = find_leaders(LeadersSpec(spec, draws=False), logits, inputs)
    spec = replace(spec, is_processed=True)
    processing = ProcessingSpec(spec, state.num_rows, spec.layout.has_drafts)
    tables = [state.counts, state.mask, state.bias]

    def run(
        make: Callable[[ProcessingSpec], KernelFn], outputs: list[Tensor], operands: list[Tensor], *shared: Tensor
    ) -> Tensor:
        def of_rows(num_rows: int) -> KernelFn:
            return make(replace(processing, sample=spec.for_rows(num_rows)))

        return run_row_kernel(of_rows, seqs, outputs, operands, shared=[*tables, *shared])[0]

    processed = empty(seqs * spec.stride, F32, device)
    processed = run(process_kernel, [processed], [inputs, state.counts, state.mask, logits])
    if processing.has_drafts:
        processed = run(drafts_kernel, [processed], [inputs, state.counts, state.mask, logits])
    processed = run(bias_kernel, [processed], [inputs, *tables, logits])
    for kernel in FILTERS:
        processed = run(partial(_of_sample, kernel), [processed], [inputs])
    drawn_from = find_leaders(LeadersSpec(spec, ranks=False), processed, inputs)
    out = empty(seqs * OUT_WIDTH, I32, device) if out is None else out
    out = run(partial(_of_sample, draw_kernel), [out], [inputs, *drawn_from, *raw], out)
    # `out` passes through this kernel, so that waiting for it waits for the counts too
    return run(count_kernel, [out, state.counts], [inputs], out)


def _of_sample(make: Callable[[SampleSpec], KernelFn], spec: ProcessingSpec) -> KernelFn:
    return make(spec.sample)


class _LogitsProcessor:
    """Processes the logits of one row, according to its settings."""

    def __init__(self, spec: ProcessingSpec, row: UOp, inputs: UOp, counts: UOp, mask: UOp) -> None:
        self._counts, self._mask, self.words = counts, mask, spec.words
        self._spec, self._row, self._inputs = spec, row, inputs

        def param(name: str) -> UOp:
            return inputs[row_word(name, row)].load()

        # a row without state reads row 0 of the state, and ignores it
        self.state_row = param("state_rows").maximum(0).minimum(spec.num_rows - 1).cast(dtypes.weakint)
        has_state = param("state_rows") >= 0
        self.mask_row = param("mask_rows").maximum(0).minimum(spec.num_rows - 1).cast(dtypes.weakint)
        self.is_counted = has_state & (param("is_counted") > 0)
        self.is_masked = has_state & (param("is_masked") > 0)
        self.num_bias = has_state.where(param("num_bias").maximum(0).minimum(MAX_LOGIT_BIAS), UOp.const(0, I32))
        self._repetition = param("repetition_penalty").bitcast(F32)
        self._frequency = param("frequency_penalty").bitcast(F32)
        self._presence = param("presence_penalty").bitcast(F32)

    def word_of(self, word: UOp) -> UOp:
        return self._mask[self.mask_row * self.words + word].load()

    @property
    def num_drafts(self) -> UOp:
        """Drafts that count as output before the row's token."""
        num = self._inputs[row_word("num_before", self._row)].load().maximum(0).minimum(MAX_SPECULATIVE_TOKENS)
        return self.is_counted.where(num, UOp.const(0, I32))

    def draft(self, place: UOp) -> UOp:
        """The id of the draft number `place` of these."""
        row = (self._row + place.cast(dtypes.weakint) + 1 - self.num_drafts.cast(dtypes.weakint)).maximum(0)
        return self._inputs[row_word("draft", row)].load()

    def times_drafted(self, body: Body, index: UOp, *outer: UOp) -> UOp | None:
        """How often an id is among the drafts before the row's token. `outer`: the loops around."""
        if not self._spec.has_drafts:
            return None
        times = fill(body, body.registers(1), 0.0, *outer)
        place = body.fold_while(self.num_drafts)
        inner = times.after(place)
        is_same = self.draft(place).eq(index.cast(I32))
        added = inner[0].store(inner[0].load() + is_same.where(UOp.const(1.0, F32), UOp.const(0.0, F32)))
        return times.after(added.end(place))[0].load().cast(I32)

    def apply(self, logit: UOp, word: UOp, lane: UOp, bits: UOp, drafted: UOp | None = None) -> UOp:
        """The processed logit of id word * 32 + lane. `bits`: the mask's word `word`; `drafted`: `times_drafted`."""
        count = self._counts[self.state_row * (self.words * WORD) + word * WORD + lane].load().cast(I32)
        count = self.is_counted.where(count, UOp.const(0, I32))
        times = count & MAX_COUNT
        if drafted is not None:
            count, times = count + drafted, times + drafted
        factor = (logit > 0.0).where(self._repetition.reciprocal(), self._repetition)
        logit = (count > 0).where(logit * factor, logit)
        logit = logit - self._frequency * times.cast(F32) - (times > 0).where(self._presence, 0.0)
        allowed = ((bits >> lane.cast(U32)) & 1).cast(I32) > 0
        return (allowed | self.is_masked.ne(True)).where(logit, NEG_INF)


@cached_kernel
def process_kernel(spec: ProcessingSpec) -> KernelFn:
    """fn(processed (R, stride), inputs, counts, mask, logits): every logit processed, without its bias."""
    seqs, stride, vocab = spec.sample.num_rows, spec.sample.stride, spec.sample.vocab_size
    is_padded = stride >= spec.words * WORD  # columns after the vocabulary may be written

    def kernel(processed: UOp, inputs: UOp, counts: UOp, mask: UOp, logits: UOp) -> UOp:
        body, has_threads = Body(), spec.sample.has_threads
        row = body.grid(seqs) if seqs > 1 or has_threads else body.loop(1)
        processor = _LogitsProcessor(spec, row, inputs, counts, mask)
        word, ends = _words(body, spec.words, has_threads)
        lane = ends[0]
        index = word * WORD + lane
        value = row_slice(spec.sample, logits, row).value_of(index if is_padded else index.minimum(vocab - 1))
        value = processor.apply(value, word, lane, processor.word_of(word))
        at = row * stride + index
        store = processed[at if is_padded else at.valid(index < vocab)].store(value).end(*ends)
        name = f"process_{seqs}x{vocab}"
        return finish(UOp.group(store).end(row), name, ops=8 * seqs * vocab, nbytes=10 * seqs * vocab)

    return kernel


@cached_kernel
def drafts_kernel(spec: ProcessingSpec) -> KernelFn:
    """fn(processed, inputs, counts, mask, logits): the ids of the drafts before each row's token again, from the raw
    logits, without their bias."""
    seqs, stride, vocab = spec.sample.num_rows, spec.sample.stride, spec.sample.vocab_size

    def kernel(processed: UOp, inputs: UOp, counts: UOp, mask: UOp, logits: UOp) -> UOp:
        body = Body()
        row = body.grid(seqs) if seqs > 1 or spec.sample.has_threads else body.loop(1)
        processor = _LogitsProcessor(spec, row, inputs, counts, mask)
        place = body.fold_while(processor.num_drafts)
        index = processor.draft(place).maximum(0).minimum(vocab - 1).cast(dtypes.weakint)
        word, lane = index // WORD, index % WORD
        drafted = processor.times_drafted(body, index, row, place)
        logit = row_slice(spec.sample, logits, row).value_of(index)
        value = processor.apply(logit, word, lane, processor.word_of(word), drafted)
        store = processed[row * stride + index].store(value)
        return finish(store.end(place, row), f"drafts_{seqs}x{vocab}", nbytes=8 * seqs)

    return kernel


def _words(body: Body, num_words: int, has_threads: bool) -> tuple[UOp, list[UOp]]:
    """(word of a mask, axes over all ids, of which the first is that over the ids of a word)."""
    if not has_threads:
        word, lane = body.loop(num_words), body.loop(WORD)
        return word, [lane, word]
    per_group = THREADS // WORD
    chunk, lane, group = body.grid(-(-num_words // per_group)), body.threads(WORD), body.threads(per_group)
    # the last word may be computed more than once, always to the same values
    return (chunk * per_group + group).minimum(num_words - 1), [lane, group, chunk]


@cached_kernel
def bias_kernel(spec: ProcessingSpec) -> KernelFn:
    """fn(processed, inputs, counts, mask, bias, logits): the ids with a bias again, from the raw logits."""
    seqs, stride, vocab = spec.sample.num_rows, spec.sample.stride, spec.sample.vocab_size

    def kernel(processed: UOp, inputs: UOp, counts: UOp, mask: UOp, bias: UOp, logits: UOp) -> UOp:
        body = Body()
        has_threads = spec.sample.has_threads
        row = body.grid(seqs) if seqs > 1 or has_threads else body.loop(1)
        thread = body.threads(THREADS) if has_threads else None
        processor = _LogitsProcessor(spec, row, inputs, counts, mask)
        width = THREADS if has_threads else 1
        chunk = body.fold_while((processor.num_bias + (width - 1)) // width)
        entry = chunk.cast(dtypes.weakint) * width + (thread if thread is not None else 0)
        at = processor.state_row * (2 * MAX_LOGIT_BIAS) + entry.minimum(MAX_LOGIT_BIAS - 1)
        index = bias[at].load().maximum(0).minimum(vocab - 1).cast(dtypes.weakint)
        added = bias[at + MAX_LOGIT_BIAS].load().bitcast(F32)
        word, lane = index // WORD, index % WORD
        logit = row_slice(spec.sample, logits, row).value_of(index)
        outer = (row, chunk) if thread is None else (row, thread, chunk)
        drafted = processor.times_drafted(body, index, *outer)
        value = processor.apply(logit + added, word, lane, processor.word_of(word), drafted)
        target = row * stride + index
        store = processed[target if thread is None else target.valid(entry.cast(I32) < processor.num_bias)].store(value)
        axes = (chunk, row) if thread is None else (chunk, thread, row)
        return finish(store.end(*axes), f"bias_{seqs}x{vocab}", nbytes=8 * seqs)

    return kernel


@cached_kernel
def count_kernel(spec: ProcessingSpec) -> KernelFn:
    """fn(out, counts, inputs): add 1 to the count of each counted row's token. `out` is only read."""
    seqs, vocab, words = spec.sample.num_rows, spec.sample.vocab_size, spec.words

    def kernel(out: UOp, counts: UOp, inputs: UOp) -> UOp:
        body = Body()
        row = body.grid(seqs) if seqs > 1 or spec.sample.has_threads else body.loop(1)

        def param(name: str) -> UOp:
            return inputs[row_word(name, row)].load()

        if spec.has_drafts:
            return finish(
                _count_right(spec, body, row, (out, counts, inputs)), f"count_{seqs}x{vocab}", nbytes=8 * seqs
            )
        token = out[row * OUT_WIDTH + OUT_TOKEN].load()
        state_row = param("state_rows")
        is_counted = (state_row >= 0) & (state_row < spec.num_rows) & (param("is_counted") > 0) & (token >= 0)
        index = state_row.maximum(0).minimum(spec.num_rows - 1).cast(dtypes.weakint) * (words * WORD)
        index = index + token.maximum(0).minimum(vocab - 1).cast(dtypes.weakint)
        count = counts[index].load().cast(I32)
        more = count + ((count & MAX_COUNT) < MAX_COUNT).where(UOp.const(1, I32), UOp.const(0, I32))
        store = counts[index.valid(is_counted)].store(more.cast(U16))
        return finish(store.end(row), f"count_{seqs}x{vocab}", nbytes=8 * seqs)

    return kernel


def _count_right(spec: ProcessingSpec, body: Body, row: UOp, buffers: tuple[UOp, UOp, UOp]) -> UOp:
    """Stores of the counts of a request's tokens, from its first row on, as far as the drafts after them are the same.

    One work item counts them one after another, since some may be the same id. Others of its rows count nothing."""
    (out, counts, inputs), seqs, vocab = buffers, spec.sample.num_rows, spec.sample.vocab_size

    def param(name: str, at: UOp) -> UOp:
        return inputs[row_word(name, at)].load()

    state_row = param("state_rows", row)
    is_first = param("num_before", row) < 1
    is_counted = (state_row >= 0) & (state_row < spec.num_rows) & (param("is_counted", row) > 0) & is_first
    start = state_row.maximum(0).minimum(spec.num_rows - 1).cast(dtypes.weakint) * (spec.words * WORD)
    num_rows = param("num_after", row).maximum(0).minimum(MAX_SPECULATIVE_TOKENS) + 1
    is_right = fill(body, body.registers(1), 1.0, row)
    place = body.fold_while(is_counted.where(num_rows, UOp.const(0, I32)))
    at = (row + place.cast(dtypes.weakint)).minimum(seqs - 1)
    token = out[at * OUT_WIDTH + OUT_TOKEN].load()
    inner, counted = is_right.after(place), counts.after(place)
    index = start + token.maximum(0).minimum(vocab - 1).cast(dtypes.weakint)
    count = counted[index].load().cast(I32)
    more = count + ((count & MAX_COUNT) < MAX_COUNT).where(UOp.const(1, I32), UOp.const(0, I32))
    was_right = inner[0].load()
    store = counted[index.valid((was_right > 0.5) & (token >= 0))].store(more.cast(U16))
    is_next = param("draft", (at + 1).minimum(seqs - 1)).eq(token)
    updated = is_right.after(store)[0].store(is_next.where(was_right, UOp.const(0.0, F32)))
    return updated.end(place, row)
