"""Beam search against all continuations, against an array implementation of Hugging Face's rules, and on an engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.builders import ENDOFTEXT_ID, IM_END_ID, TinyLlama, make_weights, write_tiny_hf_llama
from tests.engine.fakes import EOS_ID, FakeModelRunner, join, running_engine
from tests.model.test_llama import numpy_llama
from tinyvllm.config import EngineConfig, SamplingParams
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.beam import BeamSearch, BeamSettings, generate_beams
from tinyvllm.engine.output import Delta, TokenLogprob
from tinyvllm.errors import ContextLengthError, RequestError

Model = Callable[[tuple[int, ...]], np.ndarray]  # tokens -> (V,) logprobs of the next


def random_model(vocab: int, seed: int, sharpness: float = 1.0) -> Model:
    def logprobs(tokens: tuple[int, ...]) -> np.ndarray:
        logits = sharpness * np.random.default_rng([seed, *tokens]).standard_normal(vocab)
        return logits - np.log(np.exp(logits).sum())

    return logprobs


def search(model: Model, beams: BeamSearch) -> list[tuple[tuple[int, ...], str | None]]:
    while not beams.is_done:
        likeliest = []
        for beam in beams.live:
            logprobs = model(beam.token_ids)
            order = np.argsort(-logprobs, kind="stable")[: beams.num_candidates].tolist()
            likeliest.append([TokenLogprob(token, "", b"", float(logprobs[token])) for token in order])
        beams.advance(likeliest)
    return [(beam.token_ids, beam.finish_reason) for beam in beams.best]


def array_beam_search(
    model: Model, width: int, steps: int, end_ids: Sequence[int], penalty: float, *, early_stopping: bool = False
) -> list[tuple[int, ...]]:
    """Hugging Face's rules over whole score matrices, as `_beam_search` of transformers 5.23 states them."""
    prefixes, totals = [()], np.zeros(1)
    ended: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, steps + 1):
        matrix = totals[:, None] + np.stack([model(prefix) for prefix in prefixes])  # (beams, V)
        flat = np.argsort(-matrix, axis=None, kind="stable")[: (1 + max(1, len(end_ids))) * width]
        beams, tokens = np.unravel_index(flat, matrix.shape)
        candidates = [(*prefixes[beam], int(token)) for beam, token in zip(beams, tokens, strict=True)]
        scores = matrix[beams, tokens]
        stops = np.isin(tokens, list(end_ids)) | (length == steps)
        ended += [
            (score / length**penalty, c) for c, score, stop in zip(candidates, scores, stops, strict=True) if stop
        ][: np.count_nonzero(stops[:width])]
        ended = sorted(ended, key=lambda one: -one[0])[:width]
        going = np.flatnonzero(~stops)[:width]
        if not len(going):
            break
        prefixes, totals = [candidates[i] for i in going], scores[going]
        if len(ended) == width and (early_stopping or totals[0] / length**penalty <= ended[-1][0]):
            break
    return [tokens for _, tokens in ended]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beams_are_those_of_the_rules_over_arrays(length_penalty: float, early_stopping: bool) -> None:
    settings = BeamSettings(length_penalty, early_stopping)
    reasons = set()
    for seed in range(40):
        vocab, width, steps = 4 + seed % 5, 1 + seed % 4, 2 + seed % 6
        end_ids = [[], [0], [1, 3]][seed % 3]
        model = random_model(vocab, seed, sharpness=1.5)
        got = search(model, BeamSearch(width, steps, frozenset(end_ids), settings))
        expected = array_beam_search(model, width, steps, end_ids, length_penalty, early_stopping=early_stopping)
        assert [tokens for tokens, _ in got] == expected, seed
        reasons |= {reason for _, reason in got}
        assert all((tokens[-1] in end_ids) == (reason == "stop") for tokens, reason in got)
    assert reasons == {"stop", "length"}


def test_a_search_that_is_wide_enough_finds_the_best_of_all_continuations() -> None:
    vocab, steps, model = 3, 4, random_model(3, seed=9)

    def total(tokens: tuple[int, ...]) -> float:
        return sum(float(model(tokens[:i])[token]) for i, token in enumerate(tokens))

    everything = sorted(itertools.product(range(vocab), repeat=steps), key=total, reverse=True)
    found = search(model, BeamSearch(vocab ** (steps - 1), steps, frozenset()))
    assert [tokens for tokens, _ in found] == everything[: vocab ** (steps - 1)]


def test_a_width_of_one_is_greedy_and_a_larger_one_no_worse() -> None:
    model, steps = random_model(20, seed=4), 8
    greedy: tuple[int, ...] = ()
    while len(greedy) < steps:
        greedy = (*greedy, int(model(greedy).argmax()))
    beams = BeamSearch(1, steps, frozenset())
    assert search(model, beams) == [(greedy, "length")]
    wide = BeamSearch(6, steps, frozenset())
    search(model, wide)
    assert wide.best[0].total > beams.best[0].total


def test_min_tokens_keeps_beams_from_ending() -> None:
    model = random_model(6, seed=2)
    beams = BeamSearch(3, 6, frozenset({int(model(()).argmax())}), BeamSettings(), min_tokens=3)
    assert all(len(tokens) > 3 for tokens, _ in search(model, beams))


# -- on engines ------------------------------------------------------------------------------------------------------


async def collect(deltas: AsyncGenerator[Delta, None]) -> list[Delta]:
    return [delta async for delta in deltas]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny llama on disk, and what NumPy says of it."""
    numbers: dict[str, Any] = {"seed": 5}
    files = write_tiny_hf_llama(tmp_path_factory.mktemp("models") / "beams", **numbers)
    model = TinyLlama(**numbers)
    return files, model, make_weights(model)


def test_an_engines_beams_are_those_of_a_model_in_numpy(tiny: Any) -> None:
    """Widths, lengths and penalties over one engine, several searches at the same time, with prefix hits."""
    files, tiny_model, weights = tiny
    prompt = list(b"the quick brown fox")
    config = EngineConfig(
        str(files.path), max_model_len=64, max_num_seqs=8, max_num_batched_tokens=8, block_size=8,
        num_gpu_blocks_override=40, kv_cache_dtype="float32", decode_buckets=(8,), token_buckets=(8,),
    )  # fmt: skip

    def logprobs(tokens: tuple[int, ...]) -> np.ndarray:
        logits = numpy_llama(tiny_model, weights, [*prompt, *tokens])[-1]
        return logits - np.log(np.exp(logits).sum())

    cases = [(1, 6, 1.0), (3, 5, 1.0), (4, 12, 0.0), (2, 9, 2.0)]

    async def run() -> list[list[Delta]]:
        engine = AsyncEngine.start(config)
        try:
            await engine.wait_ready()
            return await asyncio.gather(
                *[
                    collect(
                        generate_beams(
                            engine,
                            prompt,
                            SamplingParams(n=width, max_tokens=steps, logprobs=2),
                            BeamSettings(penalty),
                            request_id=f"search {index}",
                        )
                    )
                    for index, (width, steps, penalty) in enumerate(cases)
                ]
            )
        finally:
            await engine.shutdown()

    for (width, steps, penalty), deltas in zip(cases, asyncio.run(run()), strict=True):
        end_ids = [IM_END_ID, ENDOFTEXT_ID]
        expected = array_beam_search(logprobs, width, steps, end_ids, penalty)
        assert [delta.token_ids for delta in deltas] == expected
        assert [delta.index for delta in deltas] == list(range(width))
        for delta in deltas:
            assert delta.num_prompt_tokens == len(prompt)
            assert delta.num_output_tokens == len(delta.token_ids)
            for place, token in enumerate(delta.logprobs):
                assert abs(token.logprob - logprobs(delta.token_ids[:place])[token.token_id]) < 1e-4
                assert len(token.top) == 2


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"top_p": 0.5}, "top_p"),
        ({"stop": ("x",)}, "stop"),
        ({"logit_bias": {1: 1.0}}, "logit_bias"),
        ({"n": 20}, "n"),
    ],
)
async def test_what_a_search_cannot_do_is_refused_by_name(settings: dict[str, Any], param: str) -> None:
    async with running_engine() as engine:
        with pytest.raises(RequestError, match=f"^{param} ") as caught:
            await collect(generate_beams(engine, [1, 2], SamplingParams(**settings), request_id="a"))
    assert caught.value.param == param


async def test_a_search_that_cannot_fit_is_refused_before_it_starts() -> None:
    runner = FakeModelRunner(max_model_len=16)
    async with running_engine(runner) as engine:
        with pytest.raises(ContextLengthError):
            await collect(generate_beams(engine, [1] * 10, SamplingParams(max_tokens=8), request_id="a"))
    assert not runner.plans


async def test_a_search_whose_reader_leaves_leaves_nothing_behind() -> None:
    runner = FakeModelRunner()
    async with running_engine(runner) as engine:
        task = asyncio.ensure_future(
            collect(generate_beams(engine, [1, 2, 3], SamplingParams(n=3, max_tokens=200), request_id="a"))
        )
        while len(runner.plans) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while engine.stats().num_running or engine.stats().num_waiting:
            await asyncio.sleep(0.001)


async def test_a_step_that_fails_ends_every_beam_with_its_error() -> None:
    runner = FakeModelRunner()

    def fail(plan: object) -> None:
        if len(runner.plans) == 2:
            raise RuntimeError("the device is gone")

    runner.before_step = fail
    async with running_engine(runner) as engine:
        deltas = await collect(generate_beams(engine, [1, 2, 3], SamplingParams(n=2, max_tokens=5), request_id="a"))
    assert [(delta.index, delta.finish_reason) for delta in deltas] == [(0, "error"), (1, "error")]
    assert "the device is gone" in str(join(deltas).error)


async def test_an_end_token_is_no_part_of_the_text() -> None:
    runner = FakeModelRunner()
    runner.choose = lambda request, digest: EOS_ID
    async with running_engine(runner) as engine:
        (delta,) = await collect(generate_beams(engine, [65], SamplingParams(max_tokens=5), request_id="a"))
    assert (delta.token_ids, delta.text, delta.finish_reason) == ((EOS_ID,), "", "stop")


async def test_beams_resume_from_checkpoints_of_recurrent_states() -> None:
    """The same beams as without states; each round computes at most a block of a beam's tokens."""
    found, prompt, params = [], [65, 66, 67] * 5, SamplingParams(n=3, max_tokens=14)
    for slots in (0, 40):
        runner = FakeModelRunner(num_state_slots=slots)
        async with running_engine(runner) as engine:
            found.append(await collect(generate_beams(engine, prompt, params, request_id="a")))
            assert (engine.stats().num_checkpoint_hits > 20) == (slots > 0)
    assert [delta.token_ids for delta in found[0]] == [delta.token_ids for delta in found[1]]
    rounds = [entry for plan in runner.plans for entry in plan.entries if "beam0." not in entry.request.request_id]
    assert len(rounds) > 30 and max(entry.count for entry in rounds) <= runner.capacity.block_size
