"""Server-sent events, written as the deltas arrive, and clients that leave.

The engine's deltas reach `EventWriter.take` by plain calls. While the client keeps up, each becomes one event, and one
call of ASGI's `send`, which is driven by hand: it returns without having waited, so it needs no task. It waits only if
the client does not read. The client is late then: the response's own task finishes this `send`, and the deltas that
arrive in the meantime are merged, to one event per choice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

from msgspec import structs
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tinyvllm.server.context import current
from tinyvllm.server.events import Events
from tinyvllm.server.failures import ClientGone
from tinyvllm.server.generation import Generation, Item

T = TypeVar("T")
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must not buffer events


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client leaves first, cancels `work` and raises ClientGone.

    The request's body must have been read, so that `receive` can only report the disconnect.
    """
    task = asyncio.current_task()
    assert task is not None
    watch = asyncio.create_task(_cancel_at_disconnection(receive, task))
    try:
        return await work
    except asyncio.CancelledError:
        if watch.done() and not watch.cancelled() and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watch.cancel()


async def _cancel_at_disconnection(receive: Receive, task: asyncio.Task[Any]) -> None:
    with contextlib.suppress(Exception):  # `receive` fails only if nobody is there any more
        while (await receive())["type"] != "http.disconnect":
            pass
    task.cancel()


class EventStream(Response):
    """The response whose events `writer` writes. However it ends, what has not been generated is aborted."""

    def __init__(self, writer: EventWriter, generation: Generation) -> None:
        self.status_code = 200
        self.media_type = writer.media_type
        self.background = None
        self.init_headers(STREAM_HEADERS)
        self._writer = writer
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        try:
            # OSError: from ASGI servers when the client has left, and TimeoutError, when it has not read for too long
            with contextlib.suppress(ClientGone, OSError):
                await until_disconnect(receive, self._writer.write_all(send, start))
        finally:
            self._generation.close()
            self._writer.close()


class EventWriter:
    """Writes the events of one answer as its items arrive: a Sink."""

    def __init__(self, events: Events) -> None:
        context = current()
        context.times_own_events = True
        self._keepalive_s, self._idle_timeout_s = context.keepalive_s, context.idle_timeout_s
        self._events = events
        self.media_type = events.media_type
        self._loop = asyncio.get_running_loop()
        self._send: Send | None = None  # None until the response has started
        self._is_live = False  # an event may be written now
        self._has_items = False
        self._unsent = [events.begin()]  # events of items that arrived before the response started
        self._late: dict[int, Item] = {}  # items that arrived while the client did not read, merged, by choice
        self._rest: _Rest | None = None  # of a `send` that waits for the client
        self._send_error: Exception | None = None
        self._has_ended = False
        self._error: BaseException | None = None
        self._news: asyncio.Future[None] = self._loop.create_future()  # done if the response's task has work
        self._written_s = 0.0  # the event loop's clock at the latest event
        self._timer: asyncio.TimerHandle | None = None

    # ---- Called by the generation ----

    def take(self, item: Item) -> None:
        if self._is_live:
            data = self._format(item)
            if data:
                self._write(data)
        elif self._has_ended:
            return
        elif self._send is None:
            self._has_items = True
            self._unsent.append(self._format(item))
            self._wake()
        else:
            earlier = self._late.get(item.choice)
            if earlier is not None:
                item = structs.replace(item, delta=earlier.delta.then(item.delta))
            self._late[item.choice] = item

    def end(self, error: BaseException | None) -> None:
        if not self._has_ended:
            self._has_ended, self._error = True, error
            self._is_live = False
            self._wake()

    # ---- Called by the route and the response, on their task ----

    async def wait_for_first(self) -> None:
        """Wait for the first item, so that the engine's refusals are raised before a status is sent.

        Waits no longer than a stream may be silent, since the first item of a long prompt can take longer than that.
        """
        timer = None if self._keepalive_s is None else self._loop.call_later(self._keepalive_s, self._wake)
        try:
            await self._wait_for_news()
        finally:
            if timer is not None:
                timer.cancel()
        if self._error is not None and not self._has_items:
            raise self._error

    async def write_all(self, send: Send, start: Message) -> None:
        """Send `start`, and events until the answer is complete. Raises TimeoutError if the client does not read for
        too long, and what `send` raises.
        """
        await send(start)
        self._send = send
        self._written_s = self._loop.time()
        self._keep_alive()
        unsent, self._unsent = b"".join(self._unsent), []
        if unsent:
            self._write(unsent)
        while self._send_error is None:
            if self._rest is not None:
                rest, self._rest = self._rest, None
                async with asyncio.timeout(self._idle_timeout_s):
                    await rest
            elif self._late:
                late, self._late = self._late, {}
                self._write(b"".join([self._format(item) for item in late.values()]))
            elif self._has_ended:
                last = self._events.end() if self._error is None else self._events.fail(self._error)
                await send({"type": "http.response.body", "body": last, "more_body": False})
                return
            else:
                self._is_live = True
                await self._wait_for_news()
        raise self._send_error

    def close(self) -> None:
        """Write nothing more."""
        self._is_live, self._has_ended = False, True
        if self._timer is not None:
            self._timer.cancel()
        if self._rest is not None:
            self._rest.close()

    def _format(self, item: Item) -> bytes:
        try:
            return self._events.take(item)
        except Exception as error:  # any error: a stream that just ended would look complete
            self.end(error)
            return b""

    def _write(self, data: bytes) -> None:
        """Send events. If that has to wait for the client, `write_all` does it."""
        assert self._send is not None
        sending = self._send({"type": "http.response.body", "body": data, "more_body": True}).__await__()
        try:
            waits_for = next(sending)
        except StopIteration:
            self._written_s = self._loop.time()
            return
        except Exception as error:
            self._send_error = error
            self.end(error)
            return
        else:
            self._rest = _Rest(sending, waits_for)
        self._is_live = False
        self._wake()

    def _keep_alive(self) -> None:
        """Send a sign of life if nothing has been sent for a while. Sets the timer."""
        every_s = self._keepalive_s
        if every_s is None:
            return
        now_s = self._loop.time()
        if now_s - self._written_s >= every_s:
            self._written_s = now_s
            if self._is_live and (data := self._events.keepalive()):
                self._write(data)
        self._timer = self._loop.call_at(self._written_s + every_s, self._keep_alive)

    def _wake(self) -> None:
        if not self._news.done():
            self._news.set_result(None)

    async def _wait_for_news(self) -> None:
        await self._news
        self._news = self._loop.create_future()


class _Rest:
    """The rest of an awaitable that was started by hand, and now waits for a future."""

    def __init__(self, started: Generator[Any, Any, Any], waits_for: Any) -> None:
        self._started = started
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._waits_for  # to the task, as `started` would have
        except BaseException:
            self._started.close()
            raise
        yield from self._started

    def close(self) -> None:
        self._started.close()


async def send_promptly(send: Send, message: Message, idle_timeout_s: float | None) -> None:
    """Send one part of an answer. Sets a timer only if the client does not read: a stream sends a part per token.

    For a response that has set its context's `times_own_events`. Raises ClientGone if it does not read for too long."""
    sending = send(message).__await__()
    try:
        waits_for = next(sending)
    except StopIteration:
        return
    try:
        async with asyncio.timeout(idle_timeout_s):
            await _Rest(sending, waits_for)
    except TimeoutError as error:
        raise ClientGone from error
