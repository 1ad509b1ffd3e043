"""Sampling against NumPy: the right distribution, the right seeds, the right logprobs. Each number of rows and each
vocabulary compiles kernels of its own, so that tests share them where any would do.
On a GPU: DEV=CL python -m pytest -m gpu tests/ops"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tinygrad import dtypes

from tests.ops.builders import Sampled, make_step, normal, sample
from tests.sweeps import swept
from tinyvllm.config import MAX_LOGPROBS
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.kernel.body import Body, empty, finish, run_kernel
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.sampling import filters as filters_module
from tinyvllm.ops.sampling.filters import mix32
from tinyvllm.ops.sampling.reference import mix32 as reference_mix32
from tinyvllm.ops.sampling.reference import threshold, uniforms
from tinyvllm.ops.sampling.sample import LEADER_WIDTH, TOP_ID, LeadersSpec, SampleSpec, draw_kernel, leaders_kernel
from tinyvllm.ops.step_inputs import StepLayout

VOCABULARIES = (5, 32, 40, 256, 1000, 49152)


@dataclass(frozen=True)
class Filters:
    """One way to sample."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """What NumPy says they should be: min-p, then top-k, then top-p, by sorting."""
        weights = np.exp((logits.astype(np.float64) - logits.max()) / self.temperature)
        order = np.argsort(-weights)
        ranked = weights[order]
        kept = ranked >= self.min_p * ranked[0]
        if self.top_k:
            kept[self.top_k :] = False
        mass = np.where(kept, ranked, 0.0).cumsum()
        kept &= mass - ranked < self.top_p * mass[-1] - 1e-12  # the tokens before it do not reach top_p yet
        out = np.zeros(len(weights))
        out[order] = np.where(kept, ranked, 0.0) / ranked[kept].sum()
        return out


FILTERS = [
    Filters(),
    Filters(temperature=0.6),
    Filters(temperature=1.7),
    Filters(top_k=5),
    Filters(top_p=0.6),
    Filters(min_p=0.1),
    Filters(temperature=1.3, top_k=12, top_p=0.8, min_p=0.02),
]


@pytest.mark.parametrize("vocab", swept((5, 40), [40]))
def test_tokens_are_drawn_as_often_as_their_probability_says(backend: Backend, vocab: int) -> None:
    """Chi-square over 4096 draws of fixed seeds; a token that a filter drops is never drawn."""
    seqs, draws = 1024, 4
    logits = 2 * normal(vocab, seed=vocab)
    for filters in FILTERS:
        counts = np.zeros(vocab)
        for draw in range(draws):
            rows = np.tile(logits, (seqs, 1))
            columns = vars(filters)
            np.add.at(counts, sample(backend, rows, draw=draw, seed=7919 * np.arange(seqs), **columns).tokens, 1)
        expected = filters.probabilities(logits) * seqs * draws
        assert (counts[expected == 0] == 0).all(), filters
        seen = expected >= 5
        chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
        freedom = max(seen.sum() - 1, 1)
        print(f"{filters}: {chi_square:.1f} of {freedom}")
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom), filters


@pytest.mark.parametrize("vocab", swept(VOCABULARIES, [1000]))
def test_tokens_and_logprobs_equal_the_reference(backend: Backend, reference: ReferenceBackend, vocab: int) -> None:
    """Every row asks for something else. The hash is the same bit for bit, so the same tokens win."""
    seqs = 64
    rng = np.random.default_rng(vocab)
    logits = 3 * normal(seqs, vocab, seed=vocab)
    columns = {
        "temperature": rng.choice([0.0, 0.5, 1.0, 1.5], seqs),
        "top_k": rng.choice([0, 1, 3, 50], seqs),
        "top_p": rng.choice([1.0, 0.9, 0.3], seqs),
        "min_p": rng.choice([0.0, 0.05], seqs),
        "seed": rng.integers(-(2**31), 2**31, seqs),
        "draw": rng.integers(0, 1000, seqs),
        "num_logprobs": rng.choice([-1, 0, 3, 5], seqs),
    }
    got, expected = (sample(ops, logits, **columns) for ops in (backend, reference))
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    for row, count in enumerate(columns["num_logprobs"]):
        if count >= 0:
            check_logprobs(got, expected, row, count)


def check_logprobs(got: Sampled, expected: Sampled, row: int, count: int) -> None:
    np.testing.assert_array_equal(got.top_ids[row, :count], expected.top_ids[row, :count])
    np.testing.assert_allclose(got.top_logprobs[row, :count], expected.top_logprobs[row, :count], atol=1e-5)
    assert abs(got.logprobs[row] - expected.logprobs[row]) < 1e-5
    assert got.ranks[row] == expected.ranks[row]


def test_filters_of_the_reference_are_those_of_sorting() -> None:
    logits = 2 * normal(40)
    for filters in FILTERS:
        weights = np.exp((logits - logits.max()) / filters.temperature)
        least = threshold(weights, min_p=filters.min_p, top_k=filters.top_k, top_p=filters.top_p)
        np.testing.assert_array_equal(weights >= least, filters.probabilities(logits) > 0)


def test_ties_at_the_edge_of_a_filter_are_all_kept(backend: Backend) -> None:
    logits = np.full((256, 40), -math.inf, np.float32)
    logits[:, :6] = 3.0, 1.0, 2.0, 2.0, 2.0, 0.0
    drawn = {
        name: set(sample(backend, logits, temperature=2.0, **{name: value}).tokens.tolist())
        for name, value in (("top_k", 2), ("top_p", 0.4))
    }
    assert drawn == {"top_k": {0, 2, 3, 4}, "top_p": {0, 2, 3, 4}}


def test_the_same_seed_gives_the_same_tokens_at_any_place_in_any_batch(backend: Backend) -> None:
    seqs, vocab = 8, 40
    logits, seeds = 2 * normal(seqs, vocab), np.arange(100, 100 + seqs)
    columns = {"temperature": 1.0, "top_p": 0.95}
    tokens = sample(backend, logits, seed=seeds, draw=5, **columns).tokens
    for order in (np.arange(seqs)[::-1], np.array([3, 1, 7]), np.array([6])):
        moved = sample(backend, logits[order], seed=seeds[order], draw=5, **columns).tokens
        np.testing.assert_array_equal(moved, tokens[order])


def test_another_seed_or_another_draw_gives_other_tokens(backend: Backend) -> None:
    logits = np.zeros((64, 1000), np.float32)
    tokens = sample(backend, logits, temperature=1.0).tokens
    for columns in ({"seed": np.arange(1000, 1064)}, {"draw": 1}):
        assert (sample(backend, logits, temperature=1.0, **columns).tokens == tokens).sum() < 5
    assert len(set(tokens.tolist())) > 50, "rows of neighboring seeds are independent"


@pytest.mark.parametrize("vocab", swept(VOCABULARIES, (5, 1000)))
def test_greedy_ties_go_to_the_lowest_id(backend: Backend, vocab: int) -> None:
    best = [[vocab - 1], [0, vocab - 1], [vocab // 2, vocab - 2], list(range(vocab))]
    logits = -np.abs(normal(len(best), vocab))
    for row, ids in enumerate(best):
        logits[row, ids] = 4.0
    np.testing.assert_array_equal(sample(backend, logits).tokens, [min(ids) for ids in best])


def test_a_temperature_of_almost_nothing_is_greedy(backend: Backend) -> None:
    logits = normal(8, 40)
    for temperature in (1e-4, 1e-40):  # the reciprocal of the latter is infinite in float32
        tokens = sample(backend, logits, temperature=temperature).tokens
        np.testing.assert_array_equal(tokens, logits.argmax(1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_suppressed_ids_are_never_drawn_yet_count_in_the_logprobs(backend: Backend, temperature: float) -> None:
    seqs, vocab = 256, 40
    logits = np.tile(normal(vocab), (seqs, 1))
    best = np.argsort(-logits[0])
    suppressed = best[:6].tolist()
    got = sample(backend, logits, temperature=temperature, suppressed_ids=[suppressed] * seqs, num_logprobs=3)
    assert not set(got.tokens.tolist()) & set(suppressed)
    if temperature == 0:
        assert set(got.tokens.tolist()) == {best[6]}
    raw = logits[0] - np.log(np.exp(logits[0]).sum())
    np.testing.assert_array_equal(got.top_ids[:, :3], np.tile(best[:3], (seqs, 1)))
    np.testing.assert_allclose(got.logprobs, raw[got.tokens], atol=1e-5)
    np.testing.assert_array_equal(got.ranks, 1 + np.argsort(best)[got.tokens])


def test_likeliest_tokens_come_in_exact_order_ties_by_id(backend: Backend) -> None:
    logits = normal(4, 1000)
    logits[1] = np.round(logits[1])  # many ties
    logits[2, 500:] = -math.inf
    logits[3, :990] = -math.inf  # fewer finite ones than asked for
    got = sample(backend, logits, num_logprobs=MAX_LOGPROBS)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(got.top_ids, expected)
    with np.errstate(divide="ignore"):
        norms = np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(got.top_logprobs, np.take_along_axis(logits, expected, 1) - norms, atol=1e-5)


def test_more_likeliest_tokens_than_there_are_end_in_minus_one(backend: Backend) -> None:
    got = sample(backend, normal(4, 5), num_logprobs=MAX_LOGPROBS)
    assert (np.sort(got.top_ids[:, :5]) == np.arange(5)).all()
    assert (got.top_ids[:, 5:] == -1).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forced_token_is_reported_with_its_own_logprob_and_rank(backend: Backend, temperature: float) -> None:
    seqs, vocab = 256, 40
    logits = normal(seqs, vocab)
    logits[1] = np.round(logits[1])  # many ties: the lower id is ahead
    forced = np.where(np.arange(seqs) % 3, np.arange(seqs) % vocab, -1)
    got = sample(backend, logits, temperature=temperature, forced=forced, num_logprobs=2)
    free = sample(backend, logits, temperature=temperature, num_logprobs=2)
    np.testing.assert_array_equal(got.tokens, np.where(forced >= 0, forced, free.tokens))
    np.testing.assert_array_equal(got.top_ids[:, :2], free.top_ids[:, :2])
    raw = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(got.logprobs, raw[np.arange(seqs), got.tokens], atol=1e-5)
    order = np.argsort(-logits, axis=1, kind="stable")
    ranks = [1 + order[row].tolist().index(token) for row, token in enumerate(got.tokens)]
    assert got.ranks.tolist() == ranks


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_finite_value_give_no_token(backend: Backend, bad: float, temperature: float) -> None:
    logits = normal(3, 40)
    logits[1] = bad
    got = sample(backend, logits, temperature=temperature, top_p=0.9, num_logprobs=2)
    assert got.tokens[1] == -1
    assert (got.tokens[[0, 2]] >= 0).all(), "the other rows are unaffected"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_single_nan_is_not_chosen(backend: Backend, temperature: float) -> None:
    logits = normal(256, 40)
    logits[:, 7] = math.nan
    tokens = sample(backend, logits, temperature=temperature).tokens
    assert (tokens >= 0).all()
    assert 7 not in tokens


EXTREMES: dict[str, list[Any]] = {
    "top_k": [0, 1, 40, 1_000_000],
    "top_p": [1e-6, 0.5, 0.99999, 1.0],
    "min_p": [0.0, 1e-6, 1.0],
    "temperature": [1e-6, 1.0, 100.0],
}


@pytest.mark.parametrize("vocab", swept((37, 40, 1000), [40]))
def test_extreme_settings_of_extreme_logits_equal_the_reference(
    backend: Backend, reference: ReferenceBackend, vocab: int
) -> None:
    """Every combination of settings, on logits that are all equal, or few, or far apart, or not numbers."""
    settings = [dict(zip(EXTREMES, values, strict=True)) for values in itertools.product(*EXTREMES.values())]
    columns = {name: [setting[name] for setting in settings] for name in EXTREMES}
    spread = normal(vocab, seed=1)
    holes, equal, steep = spread.copy(), np.full(vocab, 7.5, np.float32), np.zeros(vocab, np.float32)
    holes[::3], holes[1::7] = -np.inf, np.nan
    steep[:5] = 1e4, 1e4, 9.9e3, -1e4, 1e4
    for logits in (holes, equal, steep, 1e-3 * spread, -50 * np.abs(spread)):
        rows = np.tile(logits, (len(settings), 1))
        got, expected = (sample(ops, rows, draw=3, **columns).tokens for ops in (backend, reference))
        np.testing.assert_array_equal(got, expected)


# -- the hash --------------------------------------------------------------------------------------------------------


def test_the_hash_equals_the_references_bit_for_bit(device: DeviceHandle, kind: str) -> None:
    numbers = np.concatenate([np.arange(64), np.random.default_rng(0).integers(0, 2**32, 4032)]).astype(np.uint32)

    def kernel(out, x):  # type: ignore[no-untyped-def]
        i = Body().loop(len(numbers))
        return finish(out[i].store(mix32(x[i].load())).end(i), "hash_numbers")

    out = run_kernel(kernel, [empty(len(numbers), dtypes.uint, device.name)], [device.upload(numbers)])[0].numpy()
    np.testing.assert_array_equal(out, reference_mix32(numbers))


def test_uniform_numbers_are_uniform_and_never_0_or_1() -> None:
    numbers = uniforms(seed=-5, draw=3, count=1 << 16)
    assert 0 < numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    counts = np.histogram(numbers, 64, (0, 1))[0]
    assert ((counts - 1024) ** 2 / 1024).sum() < 63 + 4 * math.sqrt(2 * 63)
    assert np.float32(numbers.max()) < 1


# -- a row pays only for what it asks for -----------------------------------------------------------------------------


def test_only_rows_that_filter_keep_noises_and_only_rows_that_ask_rank(device: DeviceHandle, kind: str) -> None:
    """The passes' lengths are data: a pass that does not run leaves its output as it was."""
    seqs, vocab = 4, 100
    layout = StepLayout(seqs, seqs, 1, 8)
    spec = SampleSpec(layout, vocab, 128, has_threads=kind == "gpu")
    buffer = make_step(layout, [])
    views = layout.views(buffer)
    views["temperature"].view(np.float32)[:] = [0.0, 1.0, 0.0, 0.5]
    views["top_p"].view(np.float32)[:] = [0.9, 1.0, 0.9, 0.9]
    views["num_logprobs"][:] = [-1, -1, 0, 2]
    sizes = [seqs * spec.num_splits * LEADER_WIDTH, seqs * 128, seqs * 128]
    outputs = [device.upload(np.full(sizes[0], -77, np.int32)), device.upload(normal(seqs, 128))]
    outputs.append(device.upload(np.full(sizes[2], -77, np.float32)))
    out = run_kernel(leaders_kernel(LeadersSpec(spec)), outputs, [device.upload(buffer)])
    leaders, noises = out[0].numpy().reshape(seqs, LEADER_WIDTH), out[2].numpy().reshape(seqs, 128)
    assert (noises[:, :vocab] != -77).all(1).tolist() == [False, False, False, True]
    assert (noises == -77).all(1).tolist() == [True, True, True, False]
    assert (leaders[:, TOP_ID : TOP_ID + MAX_LOGPROBS] != -77).sum(1).tolist() == [0, 0, 0, 2]


PASSES: list[tuple[dict[str, Any], int]] = [
    ({"top_p": 0.9}, 4),
    ({"top_p": 0.5}, 6),
    ({"top_k": 50}, 16),
    ({"min_p": 0.05}, 1),
    ({"top_k": 20, "top_p": 0.95}, 32),
    ({"top_k": 20, "top_p": 0.95, "min_p": 0.01}, 32),
]


@pytest.mark.parametrize(
    ("filters", "most", "spread"),
    swept(
        [(*case, spread) for spread in (0.5, 3.0) for case in PASSES],
        [(*PASSES[0], 0.5)],
    ),
    ids=str,
)
def test_filtering_takes_a_few_passes(
    backend: Backend,
    reference: ReferenceBackend,
    monkeypatch: pytest.MonkeyPatch,
    filters: dict[str, Any],
    most: int,
    spread: float,
) -> None:
    """A row that has not found its token after `most` rounds gets the likeliest one, which would show. A round reads
    the logits once; finding a threshold by bisection would read them 31 times."""
    monkeypatch.setattr(filters_module, "MAX_ROUNDS", most)
    draw_kernel.cache_clear()  # type: ignore[attr-defined]
    logits = spread * normal(40, 1000, seed=7)
    tokens, expected = (sample(ops, logits, temperature=1.0, **filters).tokens for ops in (backend, reference))
    draw_kernel.cache_clear()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(tokens, expected)
