"""Logits processing against NumPy, each setting alone and all together.
On a GPU: DEV=CL python -m pytest -m gpu tests/ops"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests import sweeps
from tests.ops.builders import PENALTIES, Sampled, normal, pack_sampling, read_sampled, sample, upload_logits
from tests.ops.sampling.wishes import Wish
from tests.sweeps import swept
from tinyvllm.config import MAX_LOGIT_BIAS
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.sampling.logits_processing import (
    IN_PROMPT,
    MAX_COUNT,
    SamplingState,
    mask_words,
    sample_processed,
    state_bytes,
)
from tinyvllm.ops.sampling.reference import HostState, allowed_ids, sample_row, typical
from tinyvllm.ops.sampling.sample import SampleSpec
from tinyvllm.ops.step_inputs import StepLayout

VOCABULARIES = (5, 40, 256, 1000, 49152)
# Of the default run, where each number of rows and each vocabulary compiles kernels of its own: rows that a test has no
# use for ask for nothing.
ROWS, SHARED_ROWS = 16, 512


class Bench:
    """A device's sampling state and NumPy's, written alike; row i of a step has state row S - 1 - i."""

    def __init__(self, device: DeviceHandle, wishes: list[Wish | None], vocab: int) -> None:
        self.device, self.vocab, self.num_wishes = device, vocab, len(wishes)
        if not sweeps.is_sweeping:
            wishes = [*wishes, *[None] * (SHARED_ROWS - len(wishes))]
        self.wishes = wishes
        self.num_rows = len(wishes) + 1
        self.state = SamplingState(device, self.num_rows, vocab)
        words = mask_words(vocab)
        self.host = HostState(
            np.zeros((self.num_rows, words * 32), np.uint16),
            np.zeros((self.num_rows, words), np.uint32),
            np.zeros((self.num_rows, 2 * MAX_LOGIT_BIAS), np.int32),
        )
        for index, wish in enumerate(wishes):
            if wish is not None:
                self._write(self.num_rows - 1 - index, wish)

    def _write(self, row: int, wish: Wish) -> None:
        self.state.write_counts(row, wish.prompt, wish.output)
        self.state.write_bias(row, wish.bias)
        for token in range(self.vocab):
            self.host.counts[row, token] = wish.output.count(token) | (IN_PROMPT if token in wish.prompt else 0)
        self.host.bias[row, : len(wish.bias)] = list(wish.bias)
        values = np.array(list(wish.bias.values()), np.float32)
        self.host.bias[row, MAX_LOGIT_BIAS : MAX_LOGIT_BIAS + len(values)] = values.view(np.int32)
        if wish.allowed is not None:
            for token in wish.allowed:
                self.host.mask[row, token // 32] |= np.uint32(1 << token % 32)
            self.state.write_mask(row, self.host.mask[row])

    def pack(self, **columns: Any) -> tuple[StepLayout, np.ndarray]:
        seqs = len(self.wishes)
        layout = StepLayout(seqs, seqs, 1, 8)
        # values that an earlier step has left in a row without state must be ignored
        stale = Wish(temperature=0.0, typical_p=0.2, repetition=9.0, frequency=1.0, presence=1.0)
        wishes = [wish if wish is not None else stale for wish in self.wishes]
        names = ("temperature", "typical_p", "top_p", "top_k", "min_p", *PENALTIES)
        for name in names:
            column = f"{name}_penalty" if name in PENALTIES else name
            columns.setdefault(column, [getattr(wish, name) for wish in wishes])
        has_state = np.array([wish is not None for wish in self.wishes])
        columns["state_rows"] = np.where(has_state, self.num_rows - 1 - np.arange(seqs), -1)
        columns["mask_rows"] = columns["state_rows"]
        columns["is_counted"] = [wish is None or wish.is_counted for wish in self.wishes]
        columns["is_masked"] = [wish is None or wish.allowed is not None for wish in self.wishes]
        columns["num_bias"] = [7 if wish is None else len(wish.bias) for wish in self.wishes]
        return layout, pack_sampling(layout, columns)

    def sample(self, logits: np.ndarray, **columns: Any) -> Sampled:
        layout, buffer = self.pack(**columns)
        tensor = upload_logits(self.device, logits, layout.num_seqs)
        spec = SampleSpec(layout, self.vocab, tensor.numel() // layout.num_seqs, self.device.has_threads)
        got = read_sampled(sample_processed(spec, tensor, self.device.upload(buffer), self.state), self.num_wishes)
        kept = tensor.numpy().reshape(layout.num_seqs, -1)[: self.num_wishes, : self.vocab]
        np.testing.assert_array_equal(kept, logits)
        return got

    def expect(self, logits: np.ndarray, **columns: Any) -> Sampled:
        layout, buffer = self.pack(**columns)
        views = layout.views(buffer)
        rows = np.stack([sample_row(row, views, index, self.host) for index, row in enumerate(logits)])
        return read_sampled(self.device.upload(rows.astype(np.int32)))

    @property
    def counts(self) -> np.ndarray:
        return self.state.counts.numpy().reshape(self.num_rows, -1)[:, : self.vocab]


def draw_wish(rng: np.random.Generator, vocab: int) -> Wish:
    def some(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab, rng.integers(0, most)).tolist())

    return Wish(
        prompt=some(20),
        output=some(30),
        repetition=rng.choice([1.0, 1.3, 0.8]),
        frequency=rng.choice([0.0, 0.5, -0.7]),
        presence=rng.choice([0.0, 1.1, -0.4]),
        bias={token: rng.uniform(-5, 5) for token in some(12)},
        allowed=(*some(vocab), int(rng.integers(vocab))) if rng.random() < 0.5 else None,
        temperature=rng.choice([0.0, 0.7, 1.4]),
        typical_p=rng.choice([1.0, 0.8, 0.3]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 30]),
        min_p=rng.choice([0.0, 0.02]),
    )


@pytest.mark.parametrize("vocab", swept(VOCABULARIES, [40]))
def test_processed_rows_equal_the_reference(device: DeviceHandle, kind: str, vocab: int) -> None:
    """Every row asks for something else, some for nothing. Three steps, so that later ones read what earlier ones
    counted."""
    seqs, rng = ROWS, np.random.default_rng(vocab)
    bench = Bench(device, [draw_wish(rng, vocab) if rng.random() < 0.8 else None for _ in range(seqs)], vocab)
    suppressed = [rng.integers(0, vocab, 2 * (row % 2)).tolist() for row in range(seqs)] if vocab > 5 else []
    for draw in range(3):
        logits = 3 * normal(seqs, vocab, seed=vocab + draw)
        columns = {"seed": 31 * np.arange(seqs), "draw": draw, "num_logprobs": 3, "suppressed_ids": suppressed}
        got, expected = bench.sample(logits, **columns), bench.expect(logits, **columns)
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        np.testing.assert_array_equal(got.ranks, expected.ranks)
        np.testing.assert_array_equal(got.top_ids[:, :3], expected.top_ids[:, :3])
        np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)
        np.testing.assert_array_equal(bench.counts, bench.host.counts[:, :vocab])


def test_rows_of_drafts_count_the_drafts_before_them_and_only_right_ones_stay_counted(
    device: DeviceHandle, kind: str
) -> None:
    """A row that follows drafts draws the token that it would draw if they were in the output."""
    wish, vocab = WISHES["all"], 40
    logits = 2 * normal(5, vocab, seed=1)

    def alone(place: int, *drafts: int) -> int:
        bench = Bench(device, [replace(wish, output=(*wish.output, *drafts))], vocab)
        return int(bench.sample(logits[place : place + 1], seed=[9], draw=[4 + place]).tokens[0])

    first = alone(0)
    drafts = [first, alone(1, first), 2, 2]  # the third is wrong, so the last row's token does not count
    expected = [alone(place, *drafts[:place]) for place in range(5)]
    assert expected[:2] == drafts[:2] and expected[2] != 2
    bench = Bench(device, [None, *[wish] * 5], vocab)
    layout, buffer = bench.pack(seed=[1, *[9] * 5], draw=[0, 4, 5, 6, 7, 8])
    views = layout.views(buffer)
    views["state_rows"][1:6] = views["state_rows"][3]
    views["draft"][:6], views["num_before"][:6] = [-1, -1, *drafts], [0, 0, 1, 2, 3, 4]
    views["num_after"][1] = 4
    tensor = upload_logits(device, np.concatenate([logits[:1], logits]), layout.num_seqs)
    layout = replace(layout, has_drafts=True)
    spec = SampleSpec(layout, vocab, tensor.numel() // layout.num_seqs, device.has_threads)
    before = bench.counts
    got = read_sampled(sample_processed(spec, tensor, device.upload(buffer), bench.state))
    assert got.tokens[1:6].tolist() == expected
    added = np.zeros_like(before)
    np.add.at(added[views["state_rows"][1]], expected[:3], 1)
    np.testing.assert_array_equal(bench.counts, before + added)


WISHES = {
    "repetition": Wish(prompt=(0, 1), output=(2, 2, 3), repetition=1.8),
    "frequency": Wish(prompt=(0, 1), output=(2, 2, 2, 3), frequency=0.6),
    "presence": Wish(prompt=(0, 1), output=(2, 2, 3), presence=1.2),
    "bias": Wish(bias={0: 2.0, 4: -3.0, 7: 1.0}),
    "allowed": Wish(allowed=(1, 3, 5, 7, 11)),
    "typical_p": Wish(typical_p=0.5),
    "all": Wish(
        prompt=(0, 1, 9),
        output=(2, 2, 3, 9),
        repetition=0.7,
        frequency=0.3,
        presence=-0.5,
        bias={2: 1.5, 5: -1.0},
        allowed=(0, 1, 2, 3, 5, 8, 9, 14),
        temperature=1.4,
        typical_p=0.9,
        top_p=0.95,
        top_k=7,
        min_p=0.01,
    ),
}


@pytest.mark.parametrize("name", swept(WISHES, ["all"]))
def test_processed_tokens_are_drawn_as_often_as_their_probability_says(
    device: DeviceHandle, kind: str, name: str
) -> None:
    """Chi-square over 4096 draws of fixed seeds; a dropped id is never drawn. The counts stay those of the wish."""
    wish, seqs, draws, vocab = WISHES[name], 512, 8, 40
    logits, counts = 2 * normal(vocab, seed=3), np.zeros(vocab)
    for draw in range(draws):
        bench = Bench(device, [wish] * seqs, vocab)
        drawn = bench.sample(np.tile(logits, (seqs, 1)), draw=draw, seed=7919 * np.arange(seqs)).tokens
        np.add.at(counts, drawn, 1)
    expected = wish.probabilities(logits) * seqs * draws
    assert (counts[expected == 0] == 0).all()
    assert (wish.probabilities(logits) != Wish().probabilities(logits)).any(), "the wish changes something"
    seen = expected >= 5
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    freedom = max(seen.sum() - 1, 1)
    print(f"{name}: {chi_square:.1f} of {freedom}")
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_rows_that_ask_for_nothing_get_the_tokens_of_a_plain_step(backend: Backend, device: DeviceHandle) -> None:
    """Whatever other rows ask for, and whatever was left in the state."""
    seqs, vocab = ROWS, 40
    logits = 2 * normal(seqs, vocab)
    wishes = [WISHES["all"] if row % 3 == 0 else None for row in range(seqs)]
    columns = {"temperature": 0.9, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "num_logprobs": 1}
    plain = sample(backend, logits, seed=np.arange(seqs), **columns)
    got = Bench(device, wishes, vocab).sample(logits, seed=np.arange(seqs), **columns)
    asks = np.arange(seqs) % 3 == 0
    np.testing.assert_array_equal(got.tokens[~asks], plain.tokens[~asks])
    np.testing.assert_array_equal(got.logprobs[~asks], plain.logprobs[~asks])
    assert (got.tokens[asks] != plain.tokens[asks]).any()


def test_logprobs_and_ranks_are_those_of_the_raw_logits(device: DeviceHandle, kind: str) -> None:
    vocab = 40
    logits = np.tile(normal(vocab), (ROWS, 1))
    best = np.argsort(-logits[0])
    wishes = [Wish(bias={int(best[20]): 100.0}, temperature=0.0), Wish(allowed=(int(best[5]),))]
    got = Bench(device, [*wishes, *[None] * (ROWS - 2)], vocab).sample(logits, num_logprobs=2)
    raw = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert got.tokens[:2].tolist() == [best[20], best[5]]
    assert got.ranks[:2].tolist() == [21, 6]
    np.testing.assert_allclose(got.logprobs, raw[got.tokens], atol=1e-5)
    np.testing.assert_array_equal(got.top_ids[:, :2], [best[:2]] * ROWS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_must_not_be_sampled_is_not_whatever_its_bias(device: DeviceHandle, kind: str, temperature: float) -> None:
    """Neither ids outside the mask nor those that min_tokens holds back."""
    seqs, vocab = ROWS, 40
    wish = Wish(bias={3: 100.0, 4: 100.0, 5: 90.0}, allowed=(4, 5, 6), temperature=temperature)
    got = Bench(device, [wish] * seqs, vocab).sample(np.tile(normal(vocab), (seqs, 1)), suppressed_ids=[[4]] * seqs)
    assert set(got.tokens.tolist()) == {5}


def test_a_mask_of_nothing_gives_no_token(device: DeviceHandle, kind: str) -> None:
    wishes = [Wish(allowed=()), Wish(allowed=(1,)), Wish(allowed=(), temperature=0.0)]
    bench = Bench(device, [*wishes, *[None] * (ROWS - 3)], 40)
    assert bench.sample(normal(ROWS, 40)).tokens[:3].tolist() == [-1, 1, -1]


def test_tokens_are_counted_where_penalties_apply_and_nowhere_else(device: DeviceHandle, kind: str) -> None:
    """A prompt's mark stays next to the count; a full count stays full; a forced token of a prompt counts nothing."""
    vocab = 40
    counted = Wish(prompt=(7,), output=(7,) * 3, presence=0.5, temperature=0.0)
    bench = Bench(device, [counted, replace(counted, presence=0.0), None, counted, *[None] * (ROWS - 4)], vocab)
    others = len(bench.wishes) - 4
    full = np.zeros(mask_words(vocab) * 32, np.uint16)
    full[7] = MAX_COUNT | IN_PROMPT
    bench.state._write_counts(1 + others, full)
    logits = np.tile(np.where(np.arange(vocab) == 7, 1e6, 0.0).astype(np.float32), (ROWS, 1))
    for _ in range(2):
        assert (bench.sample(logits).tokens == 7).all()
    expected = [*[0] * (1 + others), MAX_COUNT | IN_PROMPT, 0, 3 | IN_PROMPT, 5 | IN_PROMPT]
    assert [int(row[7]) for row in bench.counts] == expected
    assert (np.delete(bench.counts, 7, axis=1) == 0).all()


def test_a_row_without_finite_logits_is_not_counted(device: DeviceHandle, kind: str) -> None:
    bench = Bench(device, [Wish(presence=1.0), *[None] * (ROWS - 1)], 40)
    assert bench.sample(np.full((ROWS, 40), math.nan, np.float32)).tokens[0] == -1
    assert (bench.counts == 0).all()


@pytest.mark.sweep  # the rows above have some
def test_as_many_biases_as_a_row_holds(device: DeviceHandle, kind: str) -> None:
    vocab = 1100
    ids = np.random.default_rng(0).permutation(vocab)[:MAX_LOGIT_BIAS].tolist()
    wish = Wish(bias={token: 10.0 * place for place, token in enumerate(ids)}, temperature=0.0)
    for last in (MAX_LOGIT_BIAS - 1, MAX_LOGIT_BIAS - 2, 500):
        bias = dict(list(wish.bias.items())[: last + 1])
        assert Bench(device, [replace(wish, bias=bias)], vocab).sample(normal(1, vocab)).tokens == [ids[last]]


# -- the reference ---------------------------------------------------------------------------------------------------


def test_typical_sampling_keeps_the_nearest_to_the_entropy_and_no_more_than_it_needs() -> None:
    weights = np.exp(normal(30, seed=4))
    probabilities = weights / weights.sum()
    surprise = -np.log(probabilities)
    distances = abs(surprise - (probabilities * surprise).sum())
    for typical_p in (0.05, 0.2, 0.5, 0.9, 0.999):
        kept = typical(weights, typical_p)
        assert distances[kept].max() < distances[~kept].min(initial=np.inf)
        assert probabilities[kept].sum() >= typical_p
        assert probabilities[kept].sum() - probabilities[distances == distances[kept].max()].sum() < typical_p
    assert typical(weights, 1.0).all()


def test_typical_sampling_may_drop_the_likeliest() -> None:
    """One id of probability 0.4 and 96 of 1/160: the entropy is nearer to the surprise of the many."""
    kept = typical(np.array([1.0, *[1 / 64] * 96]), 0.3)
    assert kept.tolist() == [False] + [True] * 96


def test_a_mask_says_which_ids_are_allowed() -> None:
    words = np.array([0b101, 1 << 31], np.uint32)
    assert np.flatnonzero(allowed_ids(words, 64)).tolist() == [0, 2, 63]
    assert len(allowed_ids(words, 40)) == 40


def test_the_state_takes_what_it_says(device: DeviceHandle, kind: str) -> None:
    state = SamplingState(device, 3, 1000)
    assert state_bytes(3, 1000) == sum(t.numel() * t.dtype.itemsize for t in (state.counts, state.mask, state.bias))
