"""Deltas on their way out: watching for clients that leave, merging prompts, server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tinyvllm.server.context import current
from tinyvllm.server.failures import AbortedError, ClientGone, StepFailedError, failure_of
from tinyvllm.server.protocol.common import PromptTokensDetails, Usage

if TYPE_CHECKING:
    from tinyvllm.engine.output import Delta

T = TypeVar("T")

DONE = "data: [DONE]\n\n"
KEEPALIVE = ": keep-alive\n\n"  # a comment, which clients of server-sent events skip


def frame(chunk: BaseModel, *, omit: set[str] | None = None) -> str:
    """One server-sent event."""
    return f"data: {chunk.model_dump_json(exclude=omit)}\n\n"


# ---- Clients that leave ----


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client leaves first, `work` is cancelled and ClientGone raised.

    The request's body must have been read: what `receive` tells then is only that the client has gone.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Sends frames as they come. When the client leaves, the request behind them is closed."""

    def __init__(self, frames: AsyncGenerator[str, None], items: AsyncGenerator[Item, None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # no proxy may hold events back
        lively = kept_alive(frames, current().keepalive_s)
        super().__init__(lively, headers=headers, media_type="text/event-stream")
        self._frames = frames
        self._items = items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientGone, OSError):  # OSError: how some ASGI servers say that the client left
                await until_disconnect(receive, self.stream_response(send))
        finally:
            await self._frames.aclose()
            # apart, since closing a generator that was never begun does not close what it would have read
            await self._items.aclose()


async def kept_alive(frames: AsyncGenerator[str, None], every_s: float | None) -> AsyncGenerator[str, None]:
    """`frames`, and a comment whenever none has come for `every_s` seconds: proxies end streams that say nothing."""
    upcoming: asyncio.Task[str] | None = None
    try:
        while True:
            upcoming = asyncio.ensure_future(_next_of(frames))
            while not (await asyncio.wait((upcoming,), timeout=every_s))[0]:
                yield KEEPALIVE
            try:
                yield upcoming.result()
            except StopAsyncIteration:
                return
    finally:
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
        await frames.aclose()


async def _next_of(source: AsyncGenerator[T, None]) -> T:
    """anext as a coroutine, of which a task can be made."""
    return await anext(source)


async def guarded(frames: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """`frames` and a last [DONE]; an error on the way becomes an event, since the status 200 has been sent."""
    async with contextlib.aclosing(frames):
        try:
            async for text in frames:
                yield text
        except Exception as error:  # all of them: a stream that just ends would look like a whole answer
            yield f"data: {failure_of(error).body()}\n\n"
    yield DONE


# ---- Deltas of several prompts ----


@dataclass(frozen=True)
class Item:
    """A delta and where it belongs."""

    prompt: int  # which prompt of the request
    choice: int  # index in the answer: prompt * n + delta.index
    delta: Delta


async def merge(streams: Sequence[AsyncGenerator[Delta, None]], n: int) -> AsyncGenerator[Item, None]:
    """The deltas of all prompts in order of arrival. Closing it closes the streams; an error in one ends all.

    Raises StepFailedError or AbortedError for a choice that ended so: there is no finish_reason for it in the format.
    """
    async with contextlib.aclosing(_interleave(streams)) as deltas:
        async for prompt, delta in deltas:
            if delta.finish_reason == "error":
                raise StepFailedError(f"generation failed: {delta.error or 'the step on the device raised an error'}")
            if delta.finish_reason == "abort":
                raise AbortedError("the request was aborted before it was complete: the server is stopping")
            yield Item(prompt, prompt * n + delta.index, delta)


async def first_choices(deltas: AsyncGenerator[Delta, None], n: int) -> AsyncGenerator[Delta, None]:
    """The deltas of the first n choices: of the best n beams, where more were followed."""
    async with contextlib.aclosing(deltas):
        async for delta in deltas:
            if delta.index < n:
                yield delta


async def _interleave(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    if len(streams) == 1:  # the usual case needs no tasks
        async with contextlib.aclosing(streams[0]) as only:
            async for delta in only:
                yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue()

    async def pump(prompt: int, stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    arrived.put_nowait((prompt, delta))
        finally:
            arrived.put_nowait((prompt, None))

    pumps = [asyncio.create_task(pump(prompt, stream)) for prompt, stream in enumerate(streams)]
    num_open = len(pumps)
    try:
        while num_open:
            prompt, arrival = await arrived.get()
            if arrival is not None:
                yield prompt, arrival
            else:
                await pumps[prompt]  # raises what ended it
                num_open -= 1
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def begun(items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """The same items, once the first is there: what the engine refuses is so refused before a status is sent.

    A first item that takes longer than a stream may be silent, that of a long prompt, is not waited for.
    """
    held = _hold_first(items, current().keepalive_s)
    await anext(held)
    return held


async def _hold_first(items: AsyncGenerator[Item, None], patience_s: float | None) -> AsyncGenerator[Any, None]:
    """Yields something before the first item: `begun` takes it, so that this runs and closing it closes `items`."""
    async with contextlib.aclosing(items):
        first = asyncio.ensure_future(_next_of(items))
        try:
            await asyncio.wait((first,), timeout=patience_s)
            if first.done():
                first.result()
            yield None
            yield await first
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        async for item in items:
            yield item


class Tally:
    """Counts tokens for `usage`: prompts once each, outputs of every choice."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}  # prompt -> (tokens, of them cached)
        self._outputs: dict[int, int] = {}  # choice -> tokens so far

    def add(self, item: Item) -> None:
        # a prompt's first delta counts: with n > 1 the later choices hit what the first has just cached
        self._prompts.setdefault(item.prompt, (item.delta.num_prompt_tokens, item.delta.num_cached_tokens))
        self._outputs[item.choice] = item.delta.num_output_tokens

    def usage(self, *, has_output: bool = True) -> Usage:
        """has_output: False where nothing was asked for but the prompt."""
        prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        completion_tokens = sum(self._outputs.values()) if has_output else 0
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(cached for _, cached in self._prompts.values())
            ),
        )
