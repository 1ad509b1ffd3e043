"""From token ids to text: incremental detokenisation, stop strings, and logprobs with their tokens spelled out."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from tinyvllm.engine.core import EngineCore
from tinyvllm.profiling import measure
from tinyvllm.scheduling.plan import TokenOut
from tinyvllm.scheduling.request import Request, TokenLogprobs
from tinyvllm.scheduling.scheduler import NO_FINITE_LOGITS
from tinyvllm.text.detokenizer import Detokenizer
from tinyvllm.text.stop import StopChecker
from tinyvllm.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenLogprob:
    """A token, how likely it was, and the likeliest tokens in its place: as many as were asked for, likeliest first."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    rank: int | None = None  # of the token; 1: the likeliest


@dataclass(frozen=True)
class Timing:
    """When one choice was where, on the monotonic clock. What never happened has the time of what follows it."""

    queued_s: float  # it entered the engine's queue
    scheduled_s: float  # it last left the queue
    first_token_s: float
    last_token_s: float
    num_preemptions: int
    is_corrupted: bool = False  # it ended because the model produced no finite logits


@dataclass(frozen=True)
class Delta:
    """New output of one choice of one request. The last one of a choice has a finish_reason."""

    index: int  # which of n
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # one a token id; empty unless asked for
    finish_reason: str | None  # stop, length, abort, error
    stop_reason: int | str | None  # the stop id or stop string that ended it
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int  # so far, of this index
    error: str | None = None  # a message, when finish_reason is "error"
    timing: Timing | None = None  # of the last delta
    # one a token of the prompt, None for the first; in the first delta of choice 0, where they are asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def then(self, later: Delta) -> Delta:
        """This and the next delta of the same choice as one."""
        return Delta(
            later.index,
            self.text + later.text,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            later.finish_reason,
            later.stop_reason,
            later.num_prompt_tokens,
            later.num_cached_tokens,
            later.num_output_tokens,
            later.error,
            later.timing,
            self.prompt_logprobs if later.prompt_logprobs is None else later.prompt_logprobs,
        )


class OutputProcessor:
    """Owns the text side of one request: bytes that are not yet a character, text that may begin a stop string."""

    def __init__(self, request: Request, tokenizer: Tokenizer, index: int = 0) -> None:
        params = request.params
        self.request = request
        self.index = index
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens)
        self._stop = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._first_token_s: float | None = None
        self._last_token_s = 0.0

    def push(self, out: TokenOut) -> Delta:
        """The new token as text. When a stop string ends the request, the delta says so before the engine knows."""
        request, finish_reason = self.request, out.finish_reason
        if out.token_id is not None:
            self._last_token_s = time.monotonic()
            self._first_token_s = self._first_token_s or self._last_token_s
        text, matched = "" if out.token_id is None else self._detokenize(out), None
        if finish_reason is not None:
            text += self._detokenizer.flush()
        if self._stop is not None and len(request.output_ids) > request.params.min_tokens:
            text, matched = self._stop.push(text)
            if finish_reason is not None and matched is None:
                text += self._stop.flush()
        return Delta(
            self.index,
            text,
            () if out.token_id is None else (out.token_id,),
            () if out.token_id is None or out.logprobs is None else (self._spell(out.token_id, out.logprobs),),
            finish_reason if matched is None else "stop",
            request.stop_reason if matched is None else matched,
            request.num_prompt_tokens,
            request.num_cached_tokens,
            len(request.output_ids),
            request.error if finish_reason == "error" else None,
            None if finish_reason is None and matched is None else self.timing(),
            self._spell_prompt() if out.token_id is not None and len(request.output_ids) == 1 else None,
        )

    def timing(self) -> Timing:
        """How the request fared, told at its end."""
        request = self.request
        now_s = time.monotonic()
        first_token_s = now_s if self._first_token_s is None else self._first_token_s
        return Timing(
            queued_s=request.arrival_s,
            scheduled_s=request.scheduled_s or first_token_s,
            first_token_s=first_token_s,
            last_token_s=self._last_token_s or first_token_s,
            num_preemptions=request.num_preemptions,
            is_corrupted=request.error == NO_FINITE_LOGITS,
        )

    def _detokenize(self, out: TokenOut) -> str:
        """Text that the token adds. The token that ends a text, EOS or a stop id, is no part of it by default.

        One that ends it because a grammar is complete is.
        """
        assert out.token_id is not None
        params = self.request.params
        is_end = out.token_id in self.request.eos_ids or out.token_id in params.stop_token_ids
        if out.finish_reason == "stop" and is_end and not params.include_stop_str_in_output:
            return ""
        return self._detokenizer.push(out.token_id)

    def _spell_prompt(self) -> tuple[TokenLogprob | None, ...] | None:
        request = self.request
        if request.num_prompt_logprobs is None:
            return None
        scores = zip(request.prompt_ids[1:], request.prompt_logprobs, strict=True)
        return (None, *[self._spell(token_id, logprobs) for token_id, logprobs in scores])

    def _spell(self, token_id: int, logprobs: TokenLogprobs) -> TokenLogprob:
        ranked = enumerate(logprobs.top, 1)
        top = tuple(self._spell_one(other_id, logprob, rank) for rank, (other_id, logprob) in ranked)
        return self._spell_one(token_id, logprobs.chosen, logprobs.rank, top)

    def _spell_one(
        self, token_id: int, logprob: float, rank: int | None, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        text, data = self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id)
        return TokenLogprob(token_id, text, data, logprob, top, rank)


class TextEngine:
    """An EngineCore that answers in Deltas. Owns the open requests' processors, and ends what reached a stop string."""

    def __init__(self, core: EngineCore, tokenizer: Tokenizer) -> None:
        self.core = core
        self.tokenizer = tokenizer
        self._processors: dict[str, OutputProcessor] = {}

    @property
    def has_work(self) -> bool:
        return self.core.has_work

    def add(self, request: Request, index: int = 0) -> None:
        """Queue a request whose deltas will carry `index`. Raises as EngineCore.add."""
        self.core.add(request)
        self._processors[request.request_id] = OutputProcessor(request, self.tokenizer, index)

    def abort(self, request_id: str) -> Delta | None:
        """End a request now and free its blocks; return its last delta. None when it is unknown or has finished."""
        request = self.core.abort(request_id)
        return None if request is None else self._push(TokenOut(request, None, None, "abort"))

    def step(self) -> list[tuple[Request, Delta]]:
        """Run one step. Raises as EngineCore.step."""
        return self._push_all(self.core.step())

    def advance_captures(self) -> list[tuple[Request, Delta]]:
        """Between two steps: see EngineCore.advance_captures."""
        return self._push_all(self.core.advance_captures())

    def _push_all(self, outs: list[TokenOut]) -> list[tuple[Request, Delta]]:
        with measure.span(measure.DETOKENIZE):
            return [(out.request, self._push(out)) for out in outs]

    def _push(self, out: TokenOut) -> Delta:
        request = out.request
        processor = self._processors[request.request_id]
        try:
            delta = processor.push(out)
        except Exception as error:  # text is one request's matter: the others go on
            logger.exception("the text of request %s cannot be made", request.request_id)
            message = f"the tokens cannot be turned into text: {error}"
            counts = request.num_prompt_tokens, request.num_cached_tokens, len(request.output_ids)
            delta = Delta(processor.index, "", (), (), "error", None, *counts, message, processor.timing())
        if delta.finish_reason is not None:
            del self._processors[request.request_id]
            if delta.finish_reason != out.finish_reason:
                self.core.finish(request, delta.finish_reason, delta.stop_reason, delta.error)
        return delta
