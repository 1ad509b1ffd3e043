"""The engine for servers: it runs on its own thread, and event loops submit requests and read outputs.

The thread loads the model, runs the steps and detokenizes. Callers' event loops post tasks to its inbox, which it
empties between steps. It replies with one `call_soon_threadsafe` per step and loop, whatever the number of requests.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tinyvllm.config import Capacity, EngineConfig, GenerationDefaults, ModelConfig, SamplingParams
from tinyvllm.engine.loading import LoadedEngine, Progress, load_engine, model_name
from tinyvllm.engine.output import Delta, TextEngine
from tinyvllm.errors import DeviceError, EngineDeadError, RequestError, TinyvllmError
from tinyvllm.scheduling.plan import StepStats as StepStats  # for the rooms above, which may not import scheduling
from tinyvllm.scheduling.request import Request
from tinyvllm.text.chat import ChatTemplate
from tinyvllm.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Task = Callable[[TextEngine], object]  # runs on the engine's thread, between two steps
OnStep = Callable[[StepStats], None]
T = TypeVar("T")
POOLINGS = ("mean", "last")
EMBEDDING_PARAMS = SamplingParams(temperature=0.0, max_tokens=1)  # one token is sampled and discarded
COMPILE_POLL_S = 0.01  # how often an idle engine checks whether background compilation has finished
Load = Callable[[EngineConfig, Progress], LoadedEngine]


class Receiver(Protocol):
    """Takes the output of one call, on the event loop that submitted it. Its methods are quick and never raise."""

    def take(self, delta: Delta) -> None:
        """New output of one choice. The last of a choice has a finish_reason."""

    def fail(self, error: TinyvllmError) -> None:
        """The call has ended, without its remaining deltas."""


class Call:
    """An open call. Used only on the event loop that submitted it."""

    def __init__(self, request_id: str, requests: list[Request], receiver: Receiver, engine: AsyncEngine) -> None:
        self.request_id = request_id
        self.requests = requests
        self.loop = asyncio.get_running_loop()
        self.num_open = len(requests)  # choices whose last delta has not been passed on
        self._receiver = receiver
        self._engine = engine
        self._is_closed = False

    def close(self) -> None:
        """Abort what has not ended. The receiver hears nothing more. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._engine._leave(self)

    def pass_on(self, news: Delta | TinyvllmError) -> None:
        if self._is_closed:
            return
        if not isinstance(news, Delta):
            self._receiver.fail(news)
            return
        self.num_open -= news.finish_reason is not None
        self._receiver.take(news)


class Reader:
    """A receiver whose deltas wait for an asynchronous reader. Those of a slow one are merged, to one per choice."""

    def __init__(self) -> None:
        self._deltas: dict[int, Delta] = {}
        self._error: TinyvllmError | None = None
        self._has_news = asyncio.Event()

    def take(self, delta: Delta) -> None:
        earlier = self._deltas.get(delta.index)
        self._deltas[delta.index] = delta if earlier is None else earlier.then(delta)
        self._has_news.set()

    def fail(self, error: TinyvllmError) -> None:
        self._error = error
        self._has_news.set()

    async def read(self) -> list[Delta]:
        """Wait for deltas and return all there are. After the last of them, raises the error that ended the call."""
        await self._has_news.wait()
        if not self._deltas and self._error is not None:
            raise self._error
        deltas, self._deltas = list(self._deltas.values()), {}
        if self._error is None:
            self._has_news.clear()
        return deltas


class AsyncEngine:
    """Owns the engine's thread. Every method may be called from any event loop."""

    def __init__(self, config: EngineConfig, progress: Progress | None, load: Load) -> None:
        self.config = config
        self.created = int(time.time())
        self.served_model_name = model_name(config)
        self.error: BaseException | None = None  # why the engine did not start, or why its thread has stopped
        self.on_step: OnStep | None = None  # called on the engine's thread after each step; must be quick
        self._progress = progress
        self._load = load
        self._engine: LoadedEngine | None = None
        self._started: Future[None] = Future()
        self._started.set_running_or_notify_cancel()  # so a caller that stops waiting does not cancel it for the others
        # Guarded by _wake:
        self._wake = threading.Condition()
        self._inbox: list[Task] = []
        self._calls: dict[str, Call] = {}  # calls that still have a reader, by request_id
        self._questions: set[Future[Any]] = set()  # not answered yet
        self._stop_at_s: float | None = None  # monotonic; set when a shutdown is requested
        self._is_closed = False  # the inbox is not read any more
        # Used by the engine's thread only:
        self._routes: dict[str, Call] = {}  # of unfinished requests, by request_id
        self._thread = threading.Thread(target=self._run, name="tinyvllm-engine", daemon=True)

    @classmethod
    def start(cls, config: EngineConfig, progress: Progress | None = None, load: Load = load_engine) -> AsyncEngine:
        """Start the thread, which loads the model, and return immediately. `progress` is called on that thread."""
        engine = cls(config, progress, load)
        engine._thread.start()
        return engine

    async def wait_ready(self) -> None:
        """Return when the engine can serve requests. Raises the error that stopped it from starting."""
        await asyncio.wrap_future(self._started)
        if self.error is not None:
            raise self.error

    @property
    def is_ready(self) -> bool:
        return self._engine is not None and not self._is_closed and self._stop_at_s is None

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._loaded.chat_template

    @property
    def model_config(self) -> ModelConfig:
        return self._loaded.model_config

    @property
    def capacity(self) -> Capacity:
        return self._loaded.capacity

    @property
    def generation_defaults(self) -> GenerationDefaults:
        return self._loaded.generation_defaults

    def stats(self) -> StepStats:
        """Counts and times of the latest step."""
        return self._engine.engine.core.stats if self._engine is not None else StepStats()

    async def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        receiver: Receiver,
        *,
        request_id: str,
        priority: int = 0,
    ) -> Call:
        """Start a request, whose output goes to `receiver`: at least one delta per choice, the last with a
        finish_reason. The caller closes the call.

        Waits until the engine is ready and the grammar is compiled; without a grammar a ready engine does not suspend.
        Raises RequestError if the request is refused, and EngineDeadError if the engine has stopped.
        """
        if self._engine is None:
            await self.wait_ready()
        loaded = self._loaded
        grammar = None if params.grammar is None else await loaded.grammars.compile(params.grammar)
        requests = loaded.factory.make_requests(request_id, prompt_ids, params, priority, grammar)
        return self._start_call(request_id, requests, receiver)

    def _start_call(self, request_id: str, requests: list[Request], receiver: Receiver) -> Call:
        call = Call(request_id, requests, receiver, self)
        self._open(call)
        return call

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> AsyncGenerator[Delta, None]:
        """`submit` as an iterator over the deltas; those of a slow reader are merged, to one per choice.

        Raises what `submit` raises before the first delta, and EngineDeadError if the engine stops. Closing or
        canceling the generator aborts the request: its blocks are free at the next step.
        """
        reader = Reader()
        call = await self.submit(prompt_ids, params, reader, request_id=request_id, priority=priority)
        try:
            num_open = params.n
            while num_open:
                for delta in await reader.read():
                    num_open -= delta.finish_reason is not None
                    yield delta
        finally:
            call.close()

    async def embed(
        self, prompt_ids: Sequence[int], pooling: str = "mean", *, request_id: str, priority: int = 0
    ) -> NDArray[np.float32]:
        """The prompt's embedding, (hidden,), normalized to length 1.

        pooling: "mean" of the hidden states after the final norm, or the "last" token's. Raises what `generate` raises,
        and DeviceError if the step failed.
        """
        if pooling not in POOLINGS:
            raise RequestError(f"pooling is {pooling!r}: choose one of {', '.join(POOLINGS)}", param="pooling")
        await self.wait_ready()
        requests = self._loaded.factory.make_requests(request_id, prompt_ids, EMBEDDING_PARAMS, priority)
        requests[0].pooling = pooling
        reader = Reader()
        call = self._start_call(request_id, requests, reader)
        try:
            deltas: list[Delta] = []
            while not deltas or deltas[-1].finish_reason is None:
                deltas = await reader.read()
        finally:
            call.close()
        pooled = requests[0].pooled
        if pooled is None or deltas[-1].finish_reason not in ("stop", "length"):
            raise DeviceError(f"the prompt could not be embedded: {deltas[-1].error or deltas[-1].finish_reason}")
        return np.asarray(pooled / max(float(np.linalg.norm(pooled)), 1e-12), np.float32)

    async def ask(self, question: Callable[[TextEngine], T]) -> T:
        """Call `question` on the engine's thread, between two steps, and return its result.

        It must be quick, since all requests wait for it. Raises what it raises, and EngineDeadError if the engine is
        not ready or stops first.
        """
        answer: Future[T] = Future()

        def task(engine: TextEngine) -> None:
            if not answer.set_running_or_notify_cancel():
                return  # the caller has stopped waiting
            try:
                answer.set_result(question(engine))
            except BaseException as error:
                answer.set_exception(error)

        with self._wake:
            if self._engine is None or self._is_closed:
                raise EngineDeadError("the engine cannot answer: it is not ready, or has stopped")
            self._post(task)
            self._questions.add(answer)
        answer.add_done_callback(self._questions.discard)
        return await asyncio.wrap_future(answer)

    def abort(self, request_id: str) -> None:
        """Abort a request: its reader gets final deltas with finish_reason "abort". Ignored if it is unknown."""
        with self._wake:
            call = self._calls.get(request_id)
            if call is not None:
                self._post(partial(self._cancel, call))

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give the running ones `drain_s` seconds, abort the rest, and end the thread."""
        with self._wake:
            stop_at_s = time.monotonic() + drain_s
            self._stop_at_s = stop_at_s if self._stop_at_s is None else min(stop_at_s, self._stop_at_s)
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    @property
    def _loaded(self) -> LoadedEngine:
        if self._engine is None:
            raise EngineDeadError("the model is not loaded: await wait_ready() first") from self.error
        return self._engine

    # On the callers' threads.

    def _open(self, call: Call) -> None:
        with self._wake:
            if self._is_closed or self._stop_at_s is not None:
                raise EngineDeadError("the engine is shut down" if self.error is None else str(self.error))
            if call.request_id in self._calls:
                raise RequestError(f"request_id {call.request_id!r} is in use: choose another", param="request_id")
            self._calls[call.request_id] = call
            self._post(partial(self._begin, call))

    def _leave(self, call: Call) -> None:
        with self._wake:
            if self._calls.get(call.request_id) is call:
                del self._calls[call.request_id]
            if call.num_open:
                self._post(partial(self._drop, call))

    def _post(self, task: Task) -> None:
        """Put a task into the inbox. The caller holds _wake."""
        if not self._is_closed:
            self._inbox.append(task)
            self._wake.notify()

    # On the engine's thread.

    def _run(self) -> None:
        """The thread's main function: load, serve, close. However it ends, no caller is left waiting."""
        try:
            loaded = self._load(self.config, self._report)
        except BaseException as error:
            self._close(error)
            self._started.set_exception(error)
            return
        self._engine = loaded
        self._started.set_result(None)
        cause: BaseException | None = None
        try:
            self._serve(loaded.engine)
        except EngineDeadError as error:
            cause = error
        except BaseException as error:
            cause = EngineDeadError(f"the engine's thread has stopped: {type(error).__name__}: {error}")
            cause.__cause__ = error
        if cause is not None:
            logger.critical("the engine's thread stops", exc_info=cause)
        self._close(cause)
        loaded.runner.close()

    def _report(self, stage: str, done: int, total: int) -> None:
        """Report progress. A shutdown requested during start-up takes effect here."""
        if self._stop_at_s is not None:
            raise EngineDeadError("the engine was shut down before it was ready")
        if self._progress is not None:
            self._progress(stage, done, total)

    def _serve(self, engine: TextEngine) -> None:
        while (tasks := self._next_tasks(engine)) is not None:
            for task in tasks:
                task(engine)
            if engine.has_work:
                self._pass_on(engine.step(), engine)
            if engine.core.has_captures_to_come:
                self._pass_on(engine.advance_captures(), engine)
        for call in set(self._routes.values()):
            self._cancel(call, engine)

    def _pass_on(self, deltas: list[tuple[Request, Delta]], engine: TextEngine) -> None:
        """Send a step's deltas to their readers, and its stats to `on_step`."""
        self._send([(self._route(request, delta), delta) for request, delta in deltas])
        self._report_step(engine.core.stats)

    def _report_step(self, stats: StepStats) -> None:
        """Call `on_step`. If it raises, the engine continues without it."""
        if self.on_step is None:
            return
        try:
            self.on_step(stats)
        except Exception:
            logger.exception("on_step raised an error and will not be called again")
            self.on_step = None

    def _next_tasks(self, engine: TextEngine) -> list[Task] | None:
        """Empty the inbox. Sleeps while there is nothing to do, and only briefly while graphs are being compiled.

        None when it is time to stop."""
        with self._wake:
            while not self._inbox and not engine.has_work and self._stop_at_s is None:
                if engine.core.has_captures_to_come:
                    self._wake.wait(COMPILE_POLL_S)
                    break
                self._wake.wait()
            if self._stop_at_s is not None:
                is_idle = not self._inbox and not engine.has_work
                if is_idle or time.monotonic() >= self._stop_at_s:
                    return None
            tasks, self._inbox = self._inbox, []
            return tasks

    def _begin(self, call: Call, engine: TextEngine) -> None:
        for index, request in enumerate(call.requests):
            try:
                engine.add(request, index)
            except RequestError as error:
                self._drop(call, engine)
                self._send([(call, error)])
                return
            self._routes[request.request_id] = call

    def _cancel(self, call: Call, engine: TextEngine) -> None:
        """Abort the unfinished requests of a call and send its reader the last deltas."""
        self._send((call, delta) for delta in self._drop(call, engine))

    def _drop(self, call: Call, engine: TextEngine) -> list[Delta]:
        """Abort the unfinished requests of a call; return their last deltas."""
        open_ids = [r.request_id for r in call.requests if self._routes.get(r.request_id) is call]
        last = []
        for request_id in open_ids:
            del self._routes[request_id]
            delta = engine.abort(request_id)
            if delta is not None:
                last.append(delta)
        return last

    def _route(self, request: Request, delta: Delta) -> Call:
        if delta.finish_reason is not None:
            return self._routes.pop(request.request_id)
        return self._routes[request.request_id]

    def _send(self, news: Iterable[tuple[Call, Delta | TinyvllmError]]) -> None:
        """Hand deltas and errors to the readers' event loops, with one call per loop."""
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[Call, Delta | TinyvllmError]]] = defaultdict(list)
        for call, item in news:
            by_loop[call.loop].append((call, item))
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_pass_on_all, batch)
            except RuntimeError:  # the loop is closed, so its readers are gone
                with self._wake:
                    for call in {call for call, _ in batch}:
                        self._post(partial(self._forget, call))

    def _forget(self, call: Call, engine: TextEngine) -> None:
        """Drop a call whose event loop is closed, and which can therefore not call `_leave`."""
        self._drop(call, engine)
        with self._wake:
            if self._calls.get(call.request_id) is call:
                del self._calls[call.request_id]

    def _close(self, error: BaseException | None) -> None:
        """Accept no more work, and raise EngineDeadError in every reader that still waits."""
        with self._wake:
            self.error = error
            self._is_closed = True
            self._inbox.clear()
            calls, questions = list(self._calls.values()), list(self._questions)
        reason = "the engine was shut down" if error is None else str(error)
        for answer in questions:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(EngineDeadError(reason))
        self._send([(call, EngineDeadError(reason)) for call in calls])


def _pass_on_all(batch: list[tuple[Call, Delta | TinyvllmError]]) -> None:
    for call, news in batch:
        call.pass_on(news)
