"""From deltas to responses: clients that leave, merging several prompts, server-sent events."""

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
    """`chunk` as one server-sent event."""
    return f"data: {chunk.model_dump_json(exclude=omit)}\n\n"


# ---- Clients that leave ----


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client leaves first, cancels `work` and raises ClientGone.

    The request's body must have been read, so that `receive` can only report the disconnect.
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
    """Sends frames as they come. If the client leaves, `frames` and `items` are closed, which ends the request."""

    def __init__(self, frames: AsyncGenerator[str, None], items: AsyncGenerator[Item, None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must not buffer events
        content = with_keepalives(frames, current().keepalive_s)
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._frames = frames
        self._items = items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientGone, OSError):  # OSError: from ASGI servers when the client has left
                await until_disconnect(receive, self.stream_response(send))
        finally:
            await self._frames.aclose()
            # separately: closing a generator that never started does not close the one that it reads
            await self._items.aclose()


async def with_keepalives(frames: AsyncGenerator[str, None], every_s: float | None) -> AsyncGenerator[str, None]:
    """`frames`, and a comment whenever none has come for `every_s` seconds, because proxies end silent streams."""
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
    """anext() as a coroutine, so that a task can run it."""
    return await anext(source)


async def errors_as_events(frames: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """`frames` and a final [DONE]. An error becomes an event, because status 200 has already been sent."""
    async with contextlib.aclosing(frames):
        try:
            async for text in frames:
                yield text
        except Exception as error:  # any error: a stream that just ended would look complete
            yield f"data: {failure_of(error).body()}\n\n"
    yield DONE


# ---- Deltas of several prompts ----


@dataclass(frozen=True)
class Item:
    """A delta, with the prompt and the choice that it belongs to."""

    prompt: int  # which prompt of the request
    choice: int  # index in the answer: prompt * n + delta.index
    delta: Delta


async def merge(streams: Sequence[AsyncGenerator[Delta, None]], n: int) -> AsyncGenerator[Item, None]:
    """The deltas of all prompts in order of arrival. Closing it closes the streams; an error in one ends them all.

    Raises StepFailedError or AbortedError for a choice that ended so, because OpenAI has no finish_reason for either.
    """
    async with contextlib.aclosing(_interleave(streams)) as deltas:
        async for prompt, delta in deltas:
            if delta.finish_reason == "error":
                raise StepFailedError(f"generation failed: {delta.error or 'the step on the device raised an error'}")
            if delta.finish_reason == "abort":
                raise AbortedError("the request was aborted before it was complete: the server is stopping")
            yield Item(prompt=prompt, choice=prompt * n + delta.index, delta=delta)


async def first_choices(deltas: AsyncGenerator[Delta, None], n: int) -> AsyncGenerator[Delta, None]:
    """The deltas of the first n choices: a beam search may follow more than it returns."""
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


async def wait_for_first(items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """Wait for the first item, then return all items: so the engine's refusals are raised before a status is sent.

    Waits no longer than a stream may be silent, since the first item of a long prompt can take longer than that.
    """
    same_items = _after_first(items, current().keepalive_s)
    await anext(same_items)
    return same_items


async def _after_first(items: AsyncGenerator[Item, None], patience_s: float | None) -> AsyncGenerator[Any, None]:
    """None, then `items`. `wait_for_first` takes the None, so that this has started and closing it closes `items`."""
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
    """Counts tokens for `usage`: each prompt once, and the output of every choice."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}  # prompt -> (tokens, of them cached)
        self._outputs: dict[int, int] = {}  # choice -> tokens so far

    def add(self, item: Item) -> None:
        # only a prompt's first delta: with n > 1, later choices hit what the first has just cached
        self._prompts.setdefault(item.prompt, (item.delta.num_prompt_tokens, item.delta.num_cached_tokens))
        self._outputs[item.choice] = item.delta.num_output_tokens

    def usage(self, *, has_output: bool = True) -> Usage:
        """has_output: False if only the prompt was requested."""
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
