"""From token ids to text: incremental detokenization, stop strings, and logprobs with the text of their tokens."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from tinyvllm.config import SamplingParams
from tinyvllm.engine.core import EngineCore
from tinyvllm.engine.messages import Output
from tinyvllm.engine.step_clock import Parts, Passage
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
    """A token, its logprob, and the requested number of most likely tokens at its position, most likely first."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    rank: int | None = None  # of the token; 1: the most likely


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When one choice reached each stage, on the monotonic clock. A skipped stage has the time of the next one."""

    submitted_s: float  # its client sent it to the engine
    queued_s: float  # it entered the engine's queue
    scheduled_s: float  # it last left the queue
    first_token_s: float
    last_token_s: float
    num_preemptions: int
    is_corrupted: bool = False  # the choice ended because the model produced no finite logits
    received_s: float = 0.0  # the client took the engine's message with the last token
    # What the engine did in the queue, until the first token, and until the last. None if it has not told: of what
    # follows the first token, if the text reached a stop string
    queue: Parts | None = None
    prefill: Parts | None = None
    decode: Parts | None = None
    num_chunks: int = 0  # steps that computed a part of its prompt
    # Draft tokens that were verified, and those accepted, as far as the engine has told: not if the text reached a stop
    # string
    num_drafted: int = 0
    num_accepted: int = 0
    num_restored_tokens: int = 0  # cached prompt tokens whose blocks came from host memory or disk


class Delta(Struct, frozen=True, kw_only=True, gc=False):
    """New output of one choice of one request. The last delta of a choice has a finish_reason."""

    index: int  # which of n
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token id; empty unless requested
    finish_reason: str | None = None  # stop, length, abort, error
    stop_reason: int | str | None = None  # the stop id or stop string that ended it
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int  # of this choice, so far
    error: str | None = None  # a message, when finish_reason is "error"
    timing: Timing | None = None  # in the first delta and in the last
    # one per prompt token, None for the first; in the first delta of choice 0, if requested
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def then(self, later: Delta) -> Delta:
        """This delta and a later one of the same choice, merged."""
        return replace(
            later,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs if later.prompt_logprobs is None else later.prompt_logprobs,
        )


class Asked(Protocol):
    """What the processor of an output reads of its request: a `NewRequest`, or a `Request`."""

    @property
    def prompt_ids(self) -> list[int]: ...

    @property
    def params(self) -> SamplingParams: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def arrival_s(self) -> float: ...

    @property
    def num_prompt_logprobs(self) -> int | None: ...


class OutputProcessor:
    """Owns the text of one request: incomplete characters, and text that may be the start of a stop string."""

    def __init__(self, request: Asked, tokenizer: Tokenizer, index: int = 0) -> None:
        params = request.params
        self.index = index
        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_output_tokens = 0
        self._request = request
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(
            tokenizer, params.skip_special_tokens, mark_special_tokens=params.mark_special_tokens
        )
        self._stop = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._num_cached_tokens = 0
        self._num_preemptions = 0
        self._queued_s = self._scheduled_s = self._first_token_s = self._last_token_s = 0.0
        self._parts: tuple[Parts | None, Parts | None] = (None, None)  # of the queue, and until the first token
        self._decode: Parts | None = None
        self._num_chunks = 0
        self._num_drafted = self._num_accepted = self._num_restored_tokens = 0

    def push_token(self, token_id: int, time_s: float, received_s: float = 0.0) -> Delta:
        """`push` for a token that neither ends the output nor has logprobs, and is not the first."""
        self.num_output_tokens += 1
        self._last_token_s = time_s
        text, stop_string, finish_reason = self._detokenizer.push(token_id), None, None
        if self._stop is not None and self.num_output_tokens > self._request.params.min_tokens:
            text, stop_string = self._stop.push(text)
            finish_reason = None if stop_string is None else "stop"
        return Delta(
            index=self.index,
            text=text,
            token_ids=(token_id,),
            finish_reason=finish_reason,
            stop_reason=stop_string,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            timing=None if finish_reason is None else self._timing(received_s),
        )

    def push(self, output: Output, time_s: float, received_s: float = 0.0) -> Delta:
        """Convert new output to text. If it completes a stop string, the delta ends before the engine's output does.

        time_s: when the token was known, on the monotonic clock. received_s: when its message arrived.
        """
        token_id = output.token_id
        is_first = token_id is not None and not self.num_output_tokens
        if output.prefill is not None:
            self._parts, self._num_chunks = (output.queue, output.prefill), output.num_chunks
        self._decode = output.decode
        self._num_cached_tokens, self._num_restored_tokens = output.num_cached_tokens, output.num_restored_tokens
        self._num_preemptions = output.num_preemptions
        self._num_drafted, self._num_accepted = output.num_drafted, output.num_accepted
        self._queued_s, self._scheduled_s = output.queued_s, output.scheduled_s
        if token_id is not None:
            self.num_output_tokens += 1
            self._last_token_s = time_s
            self._first_token_s = self._first_token_s or time_s
        text, stop_string = self._make_text(output)
        finish_reason = output.finish_reason if stop_string is None else "stop"
        is_corrupted = output.error is not None and output.error.startswith(NO_FINITE_LOGITS)
        logprobs = () if token_id is None or output.logprobs is None else (self._with_text(token_id, output.logprobs),)
        return Delta(
            index=self.index,
            text=text,
            token_ids=() if token_id is None else (token_id,),
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=output.stop_reason if stop_string is None else stop_string,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            error=output.error if output.finish_reason == "error" else None,
            timing=(
                self._timing(received_s, is_corrupted=is_corrupted) if is_first or finish_reason is not None else None
            ),
            prompt_logprobs=self._prompt_logprobs(output),
        )

    def end(self, reason: str, error: str | None = None) -> Delta:
        """The last delta of a request that the caller ends: "abort", or "error" with a message."""
        return Delta(
            index=self.index,
            text="",
            token_ids=(),
            finish_reason=reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            error=error,
            timing=self._timing(),
        )

    def _timing(self, received_s: float = 0.0, *, is_corrupted: bool = False) -> Timing:
        """The request's times so far."""
        first_token_s = self._first_token_s or time.monotonic()
        return Timing(
            submitted_s=self._request.arrival_s,
            queued_s=self._queued_s or first_token_s,
            scheduled_s=self._scheduled_s or first_token_s,
            first_token_s=first_token_s,
            last_token_s=self._last_token_s or first_token_s,
            num_preemptions=self._num_preemptions,
            is_corrupted=is_corrupted,
            received_s=received_s,
            queue=self._parts[0],
            prefill=self._parts[1],
            decode=self._decode,
            num_chunks=self._num_chunks,
            num_drafted=self._num_drafted,
            num_accepted=self._num_accepted,
            num_restored_tokens=self._num_restored_tokens,
        )

    def _make_text(self, output: Output) -> tuple[str, str | None]:
        """The text that is certain after this token, and the stop string that it completed."""
        text, stop_string = self._detokenize(output), None
        if output.finish_reason is not None:
            text += self._detokenizer.flush()
        if self._stop is not None and self.num_output_tokens > self._request.params.min_tokens:
            text, stop_string = self._stop.push(text)
            if output.finish_reason is not None and stop_string is None:
                text += self._stop.flush()
        return text, stop_string

    def _detokenize(self, output: Output) -> str:
        """Text that the token adds. By default the EOS or stop id that ends the output is not part of the text.

        A token that ends the output because it completes a grammar is part of it.
        """
        if output.token_id is None:
            return ""
        params = self._request.params
        is_end = output.token_id in self._request.eos_ids or output.token_id in params.stop_token_ids
        if output.finish_reason == "stop" and is_end and not params.include_stop_str_in_output:
            return ""
        return self._detokenizer.push(output.token_id)

    def _prompt_logprobs(self, output: Output) -> tuple[TokenLogprob | None, ...] | None:
        if output.prompt_logprobs is None:
            return None
        scores = zip(self._request.prompt_ids[1:], output.prompt_logprobs, strict=True)
        return (None, *[self._with_text(token_id, logprobs) for token_id, logprobs in scores])

    def _with_text(self, token_id: int, logprobs: TokenLogprobs) -> TokenLogprob:
        """The logprobs of one position, each with the text of its token."""
        ranked = enumerate(logprobs.top, 1)
        top = tuple(self._token_logprob(other_id, logprob, rank) for rank, (other_id, logprob) in ranked)
        return self._token_logprob(token_id, logprobs.chosen, logprobs.rank, top)

    def _token_logprob(
        self, token_id: int, logprob: float, rank: int | None, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        return TokenLogprob(
            token_id=token_id,
            token=self._tokenizer.token_text(token_id),
            bytes=self._tokenizer.token_bytes(token_id),
            logprob=logprob,
            top=top,
            rank=rank,
        )


def output_of(out: TokenOut, number: int = 0) -> Output:
    """What the step loop tells a client of one token, or of an end."""
    request = out.request
    is_first = out.token_id is not None and len(request.output_ids) == 1
    is_last = out.finish_reason is not None
    passage: Passage | None = request.passage
    queue = prefill = decode = None
    if passage is not None and passage.first is None and (is_first or is_last):
        queue, prefill = passage.before_first()
    if passage is not None and is_last:
        decode = passage.after_first()
    return Output(
        number=number,
        token_id=out.token_id,
        finish_reason=out.finish_reason,
        stop_reason=request.stop_reason if is_last else None,
        error=request.error if is_last else None,
        logprobs=out.logprobs,
        prompt_logprobs=request.prompt_logprobs if is_first and request.num_prompt_logprobs is not None else None,
        num_cached_tokens=request.num_cached_tokens,
        queued_s=request.queued_s,
        scheduled_s=request.scheduled_s,
        num_preemptions=request.num_preemptions,
        pooled=request.pooled.tobytes() if is_last and request.pooled is not None else None,
        queue=queue,
        prefill=prefill,
        decode=decode,
        num_chunks=0 if passage is None else passage.num_chunks,
        num_drafted=request.num_drafted,
        num_accepted=request.num_accepted,
        num_restored_tokens=request.num_restored_tokens,
    )


class TextEngine:
    """An EngineCore that answers in Deltas, on the caller's thread. Owns the processors of open requests, and ends
    those at a stop string."""

    def __init__(self, core: EngineCore, tokenizer: Tokenizer) -> None:
        self.core = core
        self.tokenizer = tokenizer
        self._processors: dict[str, OutputProcessor] = {}

    @property
    def has_work(self) -> bool:
        return self.core.has_work

    def add(self, request: Request, index: int = 0) -> None:
        """Queue a request whose deltas will carry `index`. Raises what EngineCore.add raises."""
        self.core.add(request)
        self._processors[request.request_id] = OutputProcessor(request, self.tokenizer, index)

    def abort(self, request_id: str) -> Delta | None:
        """End a request now and free its blocks; return its last delta. None if it is unknown or has finished."""
        request = self.core.abort(request_id)
        return None if request is None else self._push(TokenOut(request, token_id=None, finish_reason="abort"))

    def step(self) -> list[tuple[Request, Delta]]:
        """Run one step. Raises what EngineCore.step raises."""
        return self._push_all(self.core.step())

    def advance_captures(self) -> list[tuple[Request, Delta]]:
        """See EngineCore.advance_captures. Call it between two steps only."""
        return self._push_all(self.core.advance_captures())

    def _push_all(self, outs: list[TokenOut]) -> list[tuple[Request, Delta]]:
        with measure.span(measure.DETOKENIZE):
            return [(out.request, self._push(out)) for out in outs if self._is_open(out)]

    def _is_open(self, out: TokenOut) -> bool:
        """Whether a token belongs to its request's text. A step with drafts may bring some after a stop string."""
        return out.request.request_id in self._processors

    def _push(self, out: TokenOut) -> Delta:
        request = out.request
        processor = self._processors[request.request_id]
        try:
            delta = processor.push(output_of(out), time.monotonic())
        except Exception as error:  # affects this request only: the others go on
            logger.exception("the output of request %s cannot be detokenized", request.request_id)
            delta = processor.end("error", f"the output cannot be detokenized: {error}")
        if delta.finish_reason is not None:
            del self._processors[request.request_id]
            if delta.finish_reason != out.finish_reason:
                self.core.finish(request, delta.finish_reason, delta.stop_reason, delta.error)
        return delta
