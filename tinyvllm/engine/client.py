"""One event loop's side of the engine: open calls, and their tokens on the way to text.

A client numbers its requests, sends them to a step loop through a line, and turns the batches that come back into
deltas. Everything here runs on the client's event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from tinyvllm.engine.messages import (
    Abort,
    Answer,
    Ask,
    Batch,
    Blocks,
    Closed,
    Lost,
    NewRequest,
    Output,
    Refused,
    Submit,
    ToClient,
    ToEngine,
)
from tinyvllm.engine.output import Delta, OutputProcessor
from tinyvllm.engine.placement import Placement
from tinyvllm.engine.routing import Route
from tinyvllm.errors import ContextLengthError, EngineDeadError, LostError, RequestError, TinyvllmError
from tinyvllm.faults import reach
from tinyvllm.profiling import measure
from tinyvllm.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ANSWER_S = 10.0  # how long a question may wait for the step that runs; a graph's capture may take some seconds


class Receiver(Protocol):
    """Takes the output of one call, on the event loop that submitted it. Its methods are quick and never raise."""

    def take(self, delta: Delta) -> None:
        """New output of one choice. The last of a choice has a finish_reason."""

    def fail(self, error: TinyvllmError) -> None:
        """The call has ended, without its remaining deltas."""


class Line(Protocol):
    """A client's way to one engine. Raises EngineDeadError if it leads nowhere."""

    def send(self, message: ToEngine) -> None: ...


class Choice:
    """One sequence of a call: its request, and the text of its output so far."""

    def __init__(self, call: Call, request: NewRequest, processor: OutputProcessor) -> None:
        self.call = call
        self.request = request
        self.processor = processor
        self.pooled: bytes | None = None


class Call:
    """An open call."""

    def __init__(self, client: Client, request_id: str, receiver: Receiver) -> None:
        self.request_id = request_id
        self.num_open = 0  # choices whose last delta has not been passed on
        self.choices: list[Choice] = []
        self.engine = 0  # which one runs it
        self.route: Route | None = None  # its entry in the router's books, where there are several engines
        self.has_output = False
        self._client = client
        self._receiver = receiver

    def close(self) -> None:
        """Abort what has not ended. The receiver hears nothing more. May be called again."""
        self._client.close_call(self)

    def pass_on(self, delta: Delta) -> None:
        if not self.has_output:
            self.has_output = True
            self._client.note_first_output(self)
        if delta.finish_reason is not None:
            self.num_open -= 1
            if not self.num_open:
                self._client.note_end(self)
        self._receiver.take(delta)

    def fail(self, error: TinyvllmError) -> None:
        self._receiver.fail(error)


class Client:
    """Owns the open calls of one event loop, and the numbers of their requests."""

    def __init__(self, lines: Sequence[Line], tokenizer: Tokenizer, placement: Placement | None = None) -> None:
        """placement: chooses among several engines."""
        self.lines = lines
        self.placement = placement
        self.calls: dict[str, Call] = {}  # by request id
        self._tokenizer = tokenizer
        self._choices: dict[int, Choice] = {}  # unfinished ones by number
        self._numbers = itertools.count(1)
        self._questions: dict[int, tuple[int, asyncio.Future[Any]]] = {}  # number -> (engine, answer)

    def open(self, request_id: str, requests: Sequence[NewRequest], receiver: Receiver) -> Call:
        """Submit the choices of a call. Raises RequestError if its id is in use, and EngineDeadError."""
        if request_id in self.calls:
            raise RequestError(f"request_id {request_id!r} is in use: choose another", param="request_id")
        call = Call(self, request_id, receiver)
        for index, request in enumerate(requests):
            request.number = next(self._numbers)
            call.choices.append(Choice(call, request, OutputProcessor(request, self._tokenizer, index)))
        call.num_open = len(call.choices)
        self._send(call)
        self.calls[request_id] = call
        return call

    def _send(self, call: Call) -> None:
        """Send a call to an engine. Raises EngineDeadError if there is none."""
        requests = [choice.request for choice in call.choices]
        if self.placement is not None:
            call.route = self.placement.place(requests)
            engine = call.route.replica
            assert isinstance(engine, int), "a placement's replicas are numbers"
            call.engine = engine
        with measure.span(measure.SUBMIT, request=requests[0].request_id):
            try:
                reach("hop.submit")
                self.lines[call.engine].send(Submit(requests))
            except BaseException:
                self.note_end(call)
                raise
        for choice in call.choices:
            self._choices[choice.request.number] = choice

    def close_call(self, call: Call) -> None:
        if self.calls.get(call.request_id) is call:
            del self.calls[call.request_id]
        self._end(call.choices, call.engine)
        self.note_end(call)

    def note_first_output(self, call: Call) -> None:
        if self.placement is not None and call.route is not None:
            self.placement.prefilled(call.route)

    def note_end(self, call: Call) -> None:
        if self.placement is not None and call.route is not None:
            self.placement.finished(call.route)

    def abort(self, request_id: str) -> None:
        """End a call: its receiver gets last deltas with finish_reason "abort". Ignored if it is unknown."""
        call = self.calls.get(request_id)
        if call is None:
            return
        for choice in self._end(call.choices, call.engine):
            self._deliver(choice, choice.processor.end("abort"))

    async def ask(self, question: str, engine: int, *arguments: str, timeout_s: float = ANSWER_S) -> Any:
        """An engine's answer to one of `loop.QUESTIONS`, or to load_adapter. Raises RequestError if it refuses, and
        EngineDeadError if it cannot answer, or not soon: a step may hang."""
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._questions[number] = engine, answer
        try:
            self.lines[engine].send(Ask(number, question, list(arguments)))
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise EngineDeadError(f"the engine has not answered for {timeout_s:g} s: its step does not end") from None
        finally:
            self._questions.pop(number, None)

    def receive(self, message: ToClient, engine: int = 0) -> None:
        """Handle a message of an engine. If that fails, the engine's calls end, because the message is lost."""
        try:
            reach("hop.arrive")
            self._receive(message, engine)
        except Exception as error:
            logger.exception("a message of engine %d cannot be handled", engine)
            self.lose(engine, f"a message of the engine could not be handled: {type(error).__name__}: {error}")

    def lose(self, engine: int, reason: str) -> None:
        """End the calls of an engine, some of whose messages were lost."""
        for call in [call for call in self.calls.values() if call.engine == engine]:
            self._end(call.choices, engine)
            if call.num_open:
                call.fail(LostError(reason))

    def _receive(self, message: ToClient, engine: int) -> None:
        match message:
            case Batch():
                if measure.is_on():
                    now_ns = time.perf_counter_ns()
                    measure.add(measure.HOP_BACK, min(int(message.time_s * 1e9), now_ns), now_ns)
                with measure.span(measure.DETOKENIZE):
                    self._take_batch(message)
            case Refused():
                self._take_refusal(message)
            case Answer():
                _, answer = self._questions.get(message.number, (0, None))
                if answer is None or answer.done():
                    return
                if message.error is None:
                    answer.set_result(message.value)
                elif message.is_refusal:
                    answer.set_exception(RequestError(message.error, param=message.param, code=message.code))
                else:
                    answer.set_exception(EngineDeadError(message.error))
            case Blocks():
                if self.placement is not None:
                    self.placement.learn(engine, message)
            case Lost():
                self.lose(engine, message.reason)
            case Closed():
                self.fail_engine(engine, message.reason)

    def fail_engine(self, engine: int, reason: str) -> None:
        """Nothing more comes from an engine. Calls without output yet run on another; the others hear why they end."""
        if self.placement is not None:
            self.placement.remove(engine)
        for _, answer in [waiting for waiting in self._questions.values() if waiting[0] == engine]:
            if not answer.done():
                answer.set_exception(EngineDeadError(reason))
        for call in [call for call in self.calls.values() if call.engine == engine]:
            for choice in call.choices:
                self._choices.pop(choice.request.number, None)
            if call.num_open and not self._run_elsewhere(call):
                call.fail(EngineDeadError(reason))

    def _run_elsewhere(self, call: Call) -> bool:
        """Send a call whose engine has died to another, if its caller has not had any output."""
        if call.has_output or self.placement is None:
            return False
        try:
            self._send(call)
        except EngineDeadError:
            return False
        logger.warning("request %s runs on engine %d instead of one that died", call.request_id, call.engine)
        return True

    def _take_batch(self, batch: Batch) -> None:
        choices, time_s, received_s = self._choices, batch.time_s, time.monotonic()
        for number, token_id in zip(batch.numbers, batch.token_ids, strict=True):
            choice = choices.get(number)
            if choice is None:  # closed a moment ago
                continue
            try:
                delta = choice.processor.push_token(token_id, time_s, received_s)
            except Exception as error:
                delta = self._undecodable(choice, error)
            if delta.finish_reason is not None:  # found a stop string, or failed: the engine does not know yet
                self._end([choice], choice.call.engine)
            self._deliver(choice, delta)
        for output in batch.outputs:
            choice = choices.get(output.number)
            if choice is not None:
                self._take_output(choice, output, time_s, received_s)

    def _take_output(self, choice: Choice, output: Output, time_s: float, received_s: float) -> None:
        try:
            delta = choice.processor.push(output, time_s, received_s)
        except Exception as error:
            delta = self._undecodable(choice, error)
        if output.finish_reason is not None:
            del self._choices[output.number]
            choice.pooled = output.pooled
        elif delta.finish_reason is not None:
            self._end([choice], choice.call.engine)
        self._deliver(choice, delta)

    def _undecodable(self, choice: Choice, error: Exception) -> Delta:
        """The last delta of a request whose text cannot be made; the others go on."""
        logger.error("the output of request %s cannot be detokenized", choice.call.request_id, exc_info=error)
        return choice.processor.end("error", f"the output cannot be detokenized: {error}")

    def _deliver(self, choice: Choice, delta: Delta) -> None:
        try:
            choice.call.pass_on(delta)
        except Exception:  # a receiver's bug ends its own call only
            logger.exception("the receiver of request %s raised an error; its call is closed", choice.call.request_id)
            choice.call.close()

    def _take_refusal(self, refused: Refused) -> None:
        choices = [choice for number in refused.numbers if (choice := self._choices.pop(number, None)) is not None]
        if choices:
            error: TinyvllmError
            if refused.is_own_fault:
                error = LostError(refused.message)
            elif refused.code == "context_length_exceeded":
                error = ContextLengthError(refused.message, param=refused.param)
            else:
                error = RequestError(refused.message, param=refused.param, code=refused.code)
            choices[0].call.fail(error)

    def _end(self, choices: Iterable[Choice], engine: int) -> list[Choice]:
        """Abort the unfinished ones of `choices` at their engine; returns them."""
        ended = [choice for choice in choices if self._choices.pop(choice.request.number, None) is not None]
        if ended:
            try:
                reach("hop.abort")
                self.lines[engine].send(Abort([choice.request.number for choice in ended]))
            except EngineDeadError:  # a dead engine does not run them anyway
                pass
            except Exception:  # they run to their end, although nobody waits for them
                logger.exception("could not tell engine %d to abort requests", engine)
        return ended


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
