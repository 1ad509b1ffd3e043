"""Beam search: the `width` most likely continuations that it finds, by the model's raw distribution.

Each round asks the engine for one token after every live beam, together with the most likely tokens at that position.
These are ordinary requests, batched with all others, and all but the last block of their prompts is in the prefix
cache. The rules are those of Hugging Face's generate(num_beams=...) (transformers 5.23, GenerationMixin._beam_search):
a beam that ends is kept among the `width` best finished beams if it was among the `width` best candidates. Its score is
the sum of its tokens' logprobs, divided by their number to the power of the length penalty.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from msgspec import structs

from tinyvllm.config import MAX_LOGPROBS, Capacity, GenerationDefaults, SamplingParams
from tinyvllm.engine.output import Delta, TokenLogprob
from tinyvllm.errors import InvariantError, RequestError
from tinyvllm.faults import reach
from tinyvllm.scheduling.scheduler import check_length, max_request_len
from tinyvllm.text.detokenizer import detokenize
from tinyvllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class BeamSettings:
    """How beams are compared, and when to stop. Names are Hugging Face's."""

    length_penalty: float = 1.0  # above 0 favors long beams
    # True: stop when `width` beams have ended. False: go on until no live beam scores above the worst of those.
    early_stopping: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.length_penalty) and -10.0 <= self.length_penalty <= 10.0):
            raise RequestError(
                f"length_penalty is {self.length_penalty!r}: it must be between -10 and 10", param="length_penalty"
            )


@dataclass(frozen=True)
class Beam:
    """A continuation of the prompt."""

    tokens: tuple[TokenLogprob, ...] = ()
    total: float = 0.0  # sum of the tokens' logprobs
    finish_reason: str | None = None  # stop, length

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)

    def then(self, token: TokenLogprob) -> Beam:
        return replace(self, tokens=(*self.tokens, token), total=self.total + token.logprob)


class BeamSearch:
    """Owns the beams of one prompt. Call `advance` for each token until `is_done`."""

    def __init__(
        self,
        width: int,
        max_tokens: int,
        end_ids: frozenset[int],
        settings: BeamSettings = BeamSettings(),
        min_tokens: int = 0,
    ) -> None:
        self.width, self.max_tokens, self.end_ids = width, max_tokens, end_ids
        self.settings, self.min_tokens = settings, min_tokens
        self.live = [Beam()]  # best first
        self._ended: list[Beam] = []  # best first

    @property
    def num_candidates(self) -> int:
        """How many most likely tokens each beam needs: `width` that may continue, plus every id that ends a beam."""
        return self.width + len(self.end_ids)

    def advance(self, likeliest: Sequence[Sequence[TokenLogprob]]) -> None:
        """Extend the beams by one token. likeliest: per live beam, its `num_candidates` most likely next tokens."""
        candidates = [beam.then(token) for beam, tokens in zip(self.live, likeliest, strict=True) for token in tokens]
        length = len(self.live[0].tokens) + 1
        if length <= self.min_tokens:
            candidates = [beam for beam in candidates if not self._ends(beam)]
        candidates.sort(key=lambda beam: -beam.total)  # stable: ties by beam, then by rank
        is_last = length == self.max_tokens
        for beam in candidates[: self.width]:
            if is_last or self._ends(beam):
                self._keep(replace(beam, finish_reason="stop" if self._ends(beam) else "length"))
        self.live = [] if is_last else [beam for beam in candidates if not self._ends(beam)][: self.width]
        if self._is_decided():
            self.live = []

    @property
    def is_done(self) -> bool:
        return not self.live

    @property
    def best(self) -> list[Beam]:
        """The finished beams, best first: `width` of them, unless the vocabulary is too small."""
        return self._ended

    def _ends(self, beam: Beam) -> bool:
        return beam.tokens[-1].token_id in self.end_ids

    def _keep(self, beam: Beam) -> None:
        self._ended.append(beam)
        self._ended.sort(key=lambda ended: -self._score(ended))
        del self._ended[self.width :]

    def _score(self, beam: Beam) -> float:
        return beam.total / math.pow(len(beam.tokens), self.settings.length_penalty)

    def _is_decided(self) -> bool:
        """Whether the live beams can be dropped, if a live beam's score only falls, as the heuristic assumes."""
        if not self.live or len(self._ended) < self.width:
            return False
        return self.settings.early_stopping or self._score(self.live[0]) <= self._score(self._ended[-1])


class Engine(Protocol):
    """The part of AsyncEngine that the search uses."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def capacity(self) -> Capacity: ...

    @property
    def generation_defaults(self) -> GenerationDefaults: ...

    async def wait_ready(self) -> None: ...

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: str = "",
    ) -> AsyncGenerator[Delta, None]: ...


async def generate_beams(
    engine: Engine,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    settings: BeamSettings = BeamSettings(),
    *,
    request_id: str,
    priority: int = 0,
    cache_salt: str | None = None,
    adapter: str = "",
) -> AsyncGenerator[Delta, None]:
    """`AsyncEngine.generate` by beam search: params.n beams, best first, each as one delta after all have finished.

    Raises RequestError for settings that beam search cannot use, and what `generate` raises.
    """
    await engine.wait_ready()
    search = make_search(engine, len(prompt_ids), params, settings)
    one_token = SamplingParams(temperature=0.0, max_tokens=1, logprobs=search.num_candidates, ignore_eos=True)
    num_cached = 0
    while not search.is_done:
        reach("beam.round")
        length = len(search.live[0].tokens)
        names = [f"{request_id}-beam{length}.{index}" for index in range(len(search.live))]
        options: Any = {"priority": priority, "cache_salt": cache_salt}
        options |= {"adapter": adapter} if adapter else {}
        deltas = await _all(
            [
                _one_delta(engine.generate([*prompt_ids, *beam.token_ids], one_token, request_id=name, **options))
                for beam, name in zip(search.live, names, strict=True)
            ]
        )
        failed = next((delta for delta in deltas if not delta.logprobs), None)
        if failed is not None:  # aborted or failed: end all beams likewise
            for index in range(params.n):
                yield structs.replace(failed, index=index, num_prompt_tokens=len(prompt_ids), num_output_tokens=0)
            return
        num_cached = num_cached if length else deltas[0].num_cached_tokens
        search.advance([_ranked(delta) for delta in deltas])
    for index, beam in enumerate(search.best):
        yield _to_delta(engine.tokenizer, beam, index, params, len(prompt_ids), num_cached)


def make_search(engine: Engine, num_prompt_tokens: int, params: SamplingParams, settings: BeamSettings) -> BeamSearch:
    """A search for params.n beams.

    Raises RequestError for settings that beam search cannot use and for more beams than the engine's logprobs allow,
    and ContextLengthError if the output does not fit.
    """
    defaults = SamplingParams()
    for name in UNUSED:
        if getattr(params, name) != getattr(defaults, name):
            raise RequestError(f"{name} cannot be used with beam search, which does not sample: omit it", param=name)
    check_length(num_prompt_tokens, params.max_tokens, engine.capacity)
    end_ids = frozenset(params.stop_token_ids)
    if not params.ignore_eos:
        end_ids |= frozenset(engine.tokenizer.eos_ids) | frozenset(engine.generation_defaults.eos_ids)
    search = BeamSearch(
        params.n,
        params.max_tokens or max_request_len(engine.capacity) - num_prompt_tokens,
        end_ids,
        settings,
        params.min_tokens,
    )
    if search.num_candidates > MAX_LOGPROBS:
        raise RequestError(
            f"n is {params.n}: beam search can have at most {MAX_LOGPROBS - len(end_ids)} beams, because the engine "
            f"ranks {MAX_LOGPROBS} tokens and {len(end_ids)} ids may end a beam",
            param="n",
        )
    return search


# Settings that affect sampling, or that are checked while a single output grows.
UNUSED = (
    "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "logit_bias", "bad_words", "allowed_token_ids", "seed", "stop", "prompt_logprobs", "grammar",
)  # fmt: skip


async def _all(calls: Sequence[Coroutine[Any, Any, Delta]]) -> list[Delta]:
    """Run all calls concurrently. If one raises, or this is canceled, the others are canceled too."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _one_delta(deltas: AsyncGenerator[Delta, None]) -> Delta:
    """The only delta of a one-token request."""
    async with aclosing(deltas) as closing:
        async for delta in closing:
            if delta.finish_reason is not None:
                return delta
    raise InvariantError("a request ended without a last delta")


def _ranked(delta: Delta) -> list[TokenLogprob]:
    """The most likely tokens, each with the whole ranking as its `top`."""
    top = delta.logprobs[0].top
    return [replace(token, top=top) for token in top]


def _to_delta(
    tokenizer: Tokenizer, beam: Beam, index: int, params: SamplingParams, num_prompt_tokens: int, num_cached_tokens: int
) -> Delta:
    """A beam as the only delta of a choice. The token that ended it is not part of the text, unless requested."""
    ends = beam.finish_reason == "stop"
    last = beam.token_ids[-1]
    ids = beam.token_ids[:-1] if ends and not params.include_stop_str_in_output else beam.token_ids
    wanted = params.logprobs
    return Delta(
        index=index,
        text=detokenize(
            tokenizer,
            ids,
            skip_special_tokens=params.skip_special_tokens,
            mark_special_tokens=params.mark_special_tokens,
        ),
        token_ids=beam.token_ids,
        logprobs=() if wanted is None else tuple(replace(token, top=token.top[:wanted]) for token in beam.tokens),
        finish_reason=beam.finish_reason,
        stop_reason=last if ends and last in params.stop_token_ids else None,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        num_output_tokens=len(beam.token_ids),
    )
