"""Generates a response, while its request waits or in the background.

A background response outlives its request. It is stored from the beginning, so clients can poll it, cancel it,
and read its events from any one on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from tinyvllm.server.context import RequestContext, as_current, current
from tinyvllm.server.events import KEEPALIVE, ServerSentEvents
from tinyvllm.server.failures import failure_of
from tinyvllm.server.generation import Item as Output
from tinyvllm.server.generation import Job
from tinyvllm.server.openai.response_events import Event, ResponseWriter, frame_event
from tinyvllm.server.openai.response_store import Item, ResponseStore, StoredResponse
from tinyvllm.server.state import ServerState


class ResponseEvents(ServerSentEvents):
    """The events of one response, which is stored once it is complete, unless the request says store=false."""

    def __init__(self, writer: ResponseWriter, store: ResponseStore, items: tuple[Item, ...]) -> None:
        """items: of the conversation that is answered."""
        self._writer = writer
        self._store = store
        self._items = items

    def begin(self) -> bytes:
        return b"".join(map(frame_event, self._writer.begin()))

    def take(self, item: Output) -> bytes:
        return self._writer.frame_text(item.delta) or b"".join(map(frame_event, self.grow(item)))

    def end(self) -> bytes:
        return b""

    def fail(self, error: BaseException) -> bytes:
        return b"".join(map(frame_event, self._writer.fail(failure_of(error).detail())))

    def grow(self, item: Output) -> list[Event]:
        """Add an item to the answer. Returns its events.

        A complete answer is stored before its last event is sent, because the client may continue it at once.
        """
        events = list(self._writer.push(item.delta))
        answer = self._writer.answer
        if item.delta.finish_reason is not None and answer.store:
            self._store.add(StoredResponse(answer, self._items))
        return events


class BackgroundRun:
    """Generates one response on a task of its own: a Sink. Owns its events so far."""

    def __init__(self, writer: ResponseWriter, store: ResponseStore, items: tuple[Item, ...]) -> None:
        self._writer = writer
        self._store = store
        self.frames: list[bytes] = []  # one for each event; its index is the event's sequence number
        self.is_complete = False
        self._news = asyncio.Event()
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._stored = StoredResponse(writer.answer, items, self)

    async def start(self, state: ServerState, job: Job) -> None:
        """Returns once the engine has accepted the request. Raises the error if it does not."""
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._append(self._writer.begin(is_queued=True))
        self._store.add(self._stored)
        self._task = asyncio.create_task(self._run(state, job, started))
        try:
            await asyncio.shield(started)
        except BaseException:
            self.cancel()
            self._store.discard(self._writer.answer.id)
            raise

    async def _run(self, state: ServerState, job: Job, started: asyncio.Future[None]) -> None:
        """Run in a context of its own, so that the response keeps its place in the queue until it ends."""
        context = RequestContext(request_id=self._writer.answer.id)
        state.drain.begin_request()
        with as_current(context):
            try:
                await state.generate(job, self)
                started.set_result(None)
                await self._done
            except Exception as error:  # any error: nothing else would report it
                if started.done():
                    self.end(error)
                else:
                    started.set_exception(error)
            finally:
                started.cancel()  # unless it is done
                for close in context.closers:
                    close()
                state.admission.release(context)
                state.drain.end_request()

    # ---- Called by the generation ----

    def take(self, item: Output) -> None:
        if self.is_complete:
            return
        if len(self.frames) == self._writer.NUM_QUEUED_EVENTS:
            self._append(self._writer.progress())
        frame = self._writer.frame_text(item.delta)
        if frame is not None:
            self.frames.append(frame)
            self._tell()
        else:
            self._append(self._writer.push(item.delta))

    def end(self, error: BaseException | None) -> None:
        if not self.is_complete:
            if error is not None:
                self._append(self._writer.fail(failure_of(error).detail()))
            self._finish()

    # ---- Called by routes ----

    def cancel(self) -> None:
        """End the response with the output so far. A complete one is unchanged."""
        if not self.is_complete:
            self._append(self._writer.cancel())
            self._finish()
            if self._task is not None:
                self._task.cancel()

    async def follow(self, after: int) -> AsyncIterator[bytes]:
        """The events with a larger sequence number than `after`, as they come."""
        keepalive_s, position = current().keepalive_s, after + 1
        while True:
            news = self._news
            while position < len(self.frames):
                yield self.frames[position]
                position += 1
            if self.is_complete:
                return
            try:
                await asyncio.wait_for(news.wait(), keepalive_s)
            except TimeoutError:
                yield KEEPALIVE

    def _append(self, events: Iterable[Event]) -> None:
        self.frames += map(frame_event, events)
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _finish(self) -> None:
        self.is_complete = True
        self._store.update(self._stored)
        if not self._done.done():
            self._done.set_result(None)
        self._tell()
