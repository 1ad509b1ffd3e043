"""The output of one HTTP request, as the engine pushes it: no task, no queue and no future per token."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from tinyvllm.config import GRAMMAR_TOO_COMPLEX
from tinyvllm.engine.beam import BeamSettings
from tinyvllm.engine.output import Delta
from tinyvllm.errors import RequestError, TinyvllmError
from tinyvllm.server.failures import AbortedError, StepFailedError
from tinyvllm.server.request_limits import timed_out

if TYPE_CHECKING:
    from tinyvllm.config import SamplingParams


@dataclass(frozen=True)
class PromptCall:
    """What the engine is asked for one prompt."""

    ids: list[int]
    params: SamplingParams
    request_id: str


@dataclass(frozen=True)
class Job:
    """What the engine is asked for one HTTP request."""

    prompts: list[PromptCall]
    n: int  # choices per prompt in the answer; a beam search may follow more
    arrival_s: float  # perf_counter() when the request arrived
    priority: int = 0
    beams: BeamSettings | None = None  # search beams instead of sampling
    cache_salt: str | None = None  # the prefix cache is shared only with requests of the same salt

    @property
    def num_choices(self) -> int:
        return self.n * len(self.prompts)


class Item(Struct, frozen=True, gc=False):
    """A delta, with the prompt and the choice that it belongs to."""

    prompt: int  # which prompt of the request
    choice: int  # index in the answer: prompt * n + delta.index
    delta: Delta


class Sink(Protocol):
    """Takes the output of one HTTP request, on the server's event loop. Its methods are quick and never raise."""

    def take(self, item: Item) -> None:
        """New output of one choice."""

    def end(self, error: BaseException | None) -> None:
        """Nothing follows: all choices are complete, or `error` has ended those that were not."""


class OpenCall(Protocol):
    """A `Call` of the engine, or a beam search."""

    def close(self) -> None: ...


class Observer(Protocol):
    """Passes one call's output on, and counts it."""

    def take(self, delta: Delta) -> None: ...

    def fail(self, error: Exception) -> None: ...

    def abandon(self) -> None:
        """The call has been closed: count what was still open as aborted."""


class Generation:
    """The calls of one HTTP request, whose output goes to one sink. Owns the timer of --request-timeout.

    What ends one call early ends all of them: a failed step, an abort, an engine that stops, or the deadline.
    """

    def __init__(self, sink: Sink, n: int, num_open: int) -> None:
        """num_open: choices that the calls will have, also those that the answer does not show."""
        self._sink = sink
        self._n = n
        self._num_open = num_open
        self._calls: list[tuple[OpenCall, Observer]] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._is_closed = False

    def receiver(self, prompt: int) -> PromptReceiver:
        """The receiver of one prompt's output."""
        return PromptReceiver(self, self._sink, prompt, self._n)

    def add(self, call: OpenCall, observer: Observer) -> None:
        """Own a call, with the observer that passes its output on."""
        self._calls.append((call, observer))
        if self._is_closed:  # an earlier call has failed while this one was being started
            self._close_calls()

    def end_at(self, deadline_s: float | None, timeout_s: float | None) -> None:
        """End with RequestTimeoutError at `deadline_s` on the event loop's clock."""
        if deadline_s is not None and timeout_s is not None and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_at(deadline_s, lambda: self.end(timed_out(timeout_s)))

    def close(self) -> None:
        """Abort what has not ended. The sink hears nothing more. May be called again."""
        self._is_closed = True
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._close_calls()

    def end(self, error: BaseException | None) -> None:
        """Close all calls, and tell the sink that nothing follows."""
        if not self._is_closed:
            self.close()
            self._sink.end(error)

    def choice_ended(self) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self.end(None)

    def _close_calls(self) -> None:
        calls, self._calls = self._calls, []
        for call, observer in calls:
            call.close()
            observer.abandon()  # after closing: once the abort is counted, it is in the engine's inbox


class PromptReceiver:
    """Receives the output of one prompt."""

    def __init__(self, generation: Generation, sink: Sink, prompt: int, n: int) -> None:
        self._generation = generation
        self._take = sink.take
        self._prompt = prompt
        self._n = n

    def take(self, delta: Delta) -> None:
        reason = delta.finish_reason
        # OpenAI has no finish_reason for these two
        if reason == "error":
            self._generation.end(_failure(delta.error or "the step on the device raised an error"))
            return
        if reason == "abort":
            self._generation.end(AbortedError("the request was aborted before it was complete: the server is stopping"))
            return
        if delta.index < self._n:
            self._take(Item(self._prompt, self._prompt * self._n + delta.index, delta))
        if reason is not None:
            self._generation.choice_ended()

    def fail(self, error: BaseException) -> None:
        self._generation.end(error)


class BeamCall:
    """A beam search as a call: a task passes its few deltas on."""

    def __init__(self, deltas: AsyncGenerator[Delta, None], receiver: Observer) -> None:
        self._receiver = receiver
        self._task = asyncio.create_task(self._run(deltas))

    def close(self) -> None:
        self._task.cancel()

    async def _run(self, deltas: AsyncGenerator[Delta, None]) -> None:
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    self._receiver.take(delta)
        except Exception as error:  # any error: nobody else would hear of it
            self._receiver.fail(error)


def _failure(message: str) -> TinyvllmError:
    """What the engine's message says about an output that it could not go on with."""
    if message.startswith(GRAMMAR_TOO_COMPLEX):
        return RequestError(message)
    return StepFailedError(f"generation failed: {message}")
