"""The step loop: it takes requests from clients, runs steps, and sends each client the tokens that a step brought.

It runs on one thread, the only one that uses tinygrad, whose caches are bound to the thread that made them. How clients
reach it is the door's business: a list in the same process (`local_door.py`), or a socket (`socket_door.py`).
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from tinyvllm.engine.adapters import AdapterUse, require_adapters
from tinyvllm.engine.admission import to_request
from tinyvllm.engine.constraints import GrammarCompiler
from tinyvllm.engine.core import EngineCore
from tinyvllm.engine.messages import (
    Abort,
    AdapterList,
    Answer,
    Ask,
    Batch,
    Blocks,
    Goodbye,
    Hello,
    Lost,
    NewRequest,
    Output,
    Refused,
    Submit,
    ToClient,
    ToEngine,
    Unreadable,
    Welcome,
)
from tinyvllm.engine.output import output_of
from tinyvllm.engine.placement import pack_hashes
from tinyvllm.engine.step_history import StepHistory
from tinyvllm.errors import EngineDeadError, InvariantError, RequestError
from tinyvllm.faults import reach
from tinyvllm.profiling import measure
from tinyvllm.scheduling.adapter_slots import AdapterInfo
from tinyvllm.scheduling.plan import StepStats, TokenOut
from tinyvllm.scheduling.request import Constraint, Request
from tinyvllm.text.grammar import Grammar

logger = logging.getLogger(__name__)

COMPILE_POLL_S = 0.01  # how often an idle engine checks whether background compilation has finished
# how long an engine that captures while idle waits for a request first: one that comes during a trace waits for its end
IDLE_S = 0.5

BACKLOG_POLL_S = 0.02  # how often an idle engine hands blocks to a disk that had no room for more

ClientId = Hashable
Task = Callable[[], None]  # runs on the loop's thread, between two steps; one that fails is run once more
Item = tuple[ClientId, ToEngine | Unreadable] | Task


class Door(Protocol):
    """The step loop's side of its connections. `post` may be called from any thread, the others on the loop's only."""

    def receive(self, timeout_s: float | None) -> list[Item]:
        """What has arrived, in order. Waits up to `timeout_s` for the first; None: as long as it takes."""

    def send(self, client: ClientId, message: ToClient) -> None:
        """Queue a message. Never waits for the client, and ignores one that is gone. Raises if it cannot be sent."""

    def post(self, task: Task) -> None:
        """Have `receive` return `task`."""

    def close(self, reason: str) -> None:
        """Tell every client that the engine has closed, and accept nothing more."""


class EngineLoop:
    """Owns the engine's requests on behalf of its clients. `run` is the thread's main function."""

    def __init__(
        self,
        core: EngineCore,
        grammars: GrammarCompiler,
        door: Door,
        on_stats: Callable[[StepStats], None] | None = None,
    ) -> None:
        """on_stats: called with the stats whenever they change; must be quick."""
        self.core = core
        self._grammars = grammars
        self._door = door
        self._on_stats = on_stats
        self._history = StepHistory()
        self._clients: defaultdict[ClientId, dict[int, Request]] = defaultdict(dict)  # unfinished requests by number
        self._owners: dict[Request, tuple[ClientId, int]] = {}  # the same, the other way round
        self._waiting: dict[tuple[ClientId, int], Submit] = {}  # calls whose grammar is being compiled, by first number
        self._routers: set[ClientId] = set()  # clients that are told of the prefix cache
        self._greeted: set[ClientId] = set()  # clients that are told of the loaded adapters
        self._adapter_reader = ThreadPoolExecutor(1, thread_name_prefix="tinyvllm-adapters")
        self._has_routed = False  # there has been one, so the pool records its changes
        self._stop_at_s: float | None = None  # monotonic; set when a stop is requested

    # ---- From any thread ----

    def stop(self, drain_s: float = 0.0) -> None:
        """Give the running requests `drain_s` seconds, abort the rest, and let `run` return. May be called again."""
        stop_at_s = time.monotonic() + drain_s
        self._stop_at_s = stop_at_s if self._stop_at_s is None else min(stop_at_s, self._stop_at_s)
        self._door.post(lambda: None)  # so that a sleeping loop looks

    def drop_client(self, client: ClientId) -> None:
        """End the requests of a client that has died."""
        self._door.post(partial(self._forget, client))

    # ---- On the loop's thread ----

    def run(self) -> None:
        """Serve until `stop`. Raises EngineDeadError if steps fail for good, and whatever a bug raises.

        The caller closes the door, with the reason.
        """
        self._serve()
        self._adapter_reader.shutdown(wait=False, cancel_futures=True)
        for client in list(self._clients):
            self._abort_all(client, tells=True)

    def _serve(self) -> None:
        core = self.core
        while True:
            with measure.span(measure.INBOX):
                items = self._door.receive(self._patience_s())
            for item in items:
                self._take(item)
            if self._stop_at_s is not None and (self._is_idle or time.monotonic() >= self._stop_at_s):
                return
            is_busy = bool(items) or core.has_work
            if core.has_work:
                outs = core.step()
                with measure.span(measure.REPLY):
                    self._pass_on(outs)
            elif core.has_backlog:
                core.flush_tiers()
            if core.has_captures_to_come and not (is_busy and core.captures_when_idle):
                self._pass_on(core.advance_captures())

    @property
    def _is_idle(self) -> bool:
        return not self.core.has_work and not self._waiting

    def _patience_s(self) -> float | None:
        """How long to wait for messages: not at all while there is work."""
        if self.core.has_work:
            return 0.0
        if self._stop_at_s is not None:
            return max(0.0, self._stop_at_s - time.monotonic()) if self._waiting else 0.0
        if self.core.has_backlog:
            return BACKLOG_POLL_S
        if not self.core.has_captures_to_come:
            return None
        return IDLE_S if self.core.captures_when_idle else COMPILE_POLL_S

    def _pass_on(self, outs: list[TokenOut]) -> None:
        """Send each client its part of a step's tokens in one message, and report the stats."""
        stats = self.core.stats
        if self._has_routed:  # first, so that a router knows a prompt's blocks when the prompt's request ends
            self._send_changes()
        if outs:
            self._send_tokens(outs, stats.end_s)
        self._history.add(stats)
        if self._on_stats is not None:
            self._on_stats(stats)

    def _send_tokens(self, outs: list[TokenOut], time_s: float) -> None:
        batches: dict[ClientId, Batch] = {}
        for out in outs:
            request = out.request
            owner = self._owners.get(request)
            if owner is None:  # its client has aborted it
                continue
            client, number = owner
            batch = batches.get(client)
            if batch is None:
                batch = batches[client] = Batch(time_s, [], [], [])
            is_plain = out.finish_reason is None and out.logprobs is None and len(request.output_ids) > 1
            if is_plain and out.token_id is not None:
                batch.numbers.append(number)
                batch.token_ids.append(out.token_id)
                continue
            batch.outputs.append(output_of(out, number))
            if out.finish_reason is not None:
                self._release(request)
        for client, batch in batches.items():
            self._send(client, batch)

    def _send(self, client: ClientId, message: ToClient) -> None:
        """Send a message. If that fails, the client's calls end, because they would wait for it."""
        try:
            reach("engine.deliver")
            self._door.send(client, message)
        except Exception as error:
            logger.exception("a message to client %s cannot be sent: its requests are ended", client)
            self._lose(client, f"the engine could not send a message: {_describe(error)}")

    def _lose(self, client: ClientId, reason: str) -> None:
        """End the requests of a client whose messages were lost, and tell it. Raises if that message fails too."""
        self._abort_all(client)
        self._door.send(client, Lost(reason))

    def _send_changes(self) -> None:
        """Tell the routers how the prefix cache has changed."""
        stored, removed = self.core.scheduler.block_manager.take_changes()
        if stored or removed:
            changes = Blocks(pack_hashes(stored), pack_hashes(removed))
            for client in self._routers:
                self._send(client, changes)

    def _release(self, request: Request) -> None:
        client, number = self._owners.pop(request)
        self._clients[client].pop(number, None)

    def _take(self, item: Item) -> None:
        """Run a task, or handle a message. An error affects the sender only. Raises EngineDeadError if it has left the
        pool inconsistent."""
        try:
            reach("engine.receive")
            self._run_item(item)
        except (EngineDeadError, InvariantError):
            raise
        except Exception as error:
            logger.exception("a client's message cannot be handled")
            self.core.check()
            match item:
                case (client, Submit() as call):
                    self._refuse(client, call, error)
                case (client, Ask() as ask):
                    self._send(client, Answer(ask.number, error=_describe(error)))
                case _:  # may be done twice: once more, and a second error ends the engine
                    self._run_item(item)

    def _run_item(self, item: Item) -> None:
        if callable(item):
            item()
        else:
            self._handle(*item)

    def _handle(self, client: ClientId, message: ToEngine | Unreadable) -> None:
        match message:
            case Submit():
                with measure.span(measure.RECEIVE, request=message.requests[0].request_id):
                    self._submit(client, message)
            case Abort():
                for number in message.numbers:
                    self._abort(client, number)
                self._report()
            case Ask(question="load_adapter"):
                self._load_adapter(client, message)
            case Ask():
                self._send(client, self._answer(message))
            case Hello():
                self._welcome(client, message)
            case Goodbye():
                self._forget(client)
            case Unreadable():
                self._lose(client, message.reason)

    def _welcome(self, client: ClientId, hello: Hello) -> None:
        runner, manager = self.core.runner, self.core.scheduler.block_manager
        self._send(client, Welcome(runner.model_config, runner.capacity, self.loaded_adapters()))
        self._greeted.add(client)
        if hello.routes:
            self._send_changes()
            self._routers.add(client)
            self._has_routed = True
            self._send(client, Blocks(pack_hashes(manager.cached_hashes()), b""))

    def _submit(self, client: ClientId, call: Submit) -> None:
        source = call.requests[0].grammar
        if source is None:
            self._begin(client, call, None)
            return
        grammar = self._grammars.compile_source(source)
        if grammar.done():
            self._begin(client, call, grammar)
            return
        self._waiting[client, call.requests[0].number] = call
        grammar.add_done_callback(
            lambda compiled: self._door.post(partial(self._begin_waiting, client, call, compiled))
        )

    def _begin_waiting(self, client: ClientId, call: Submit, grammar: Future[Grammar]) -> None:
        if self._waiting.pop((client, call.requests[0].number), None) is not None:  # else it was aborted
            self._begin(client, call, grammar)

    def _begin(self, client: ClientId, call: Submit, grammar: Future[Grammar] | None) -> None:
        """Queue the choices of a call, or none of them if one is refused."""
        try:
            for new in call.requests:
                self._add(client, new, None if grammar is None else grammar.result().matcher())
        except Exception as error:  # of the grammar's compiler, say: it concerns this call only
            if not isinstance(error, RequestError):
                logger.exception("request %s cannot be started", call.requests[0].request_id)
            self._refuse(client, call, error)
        self._report()

    def _refuse(self, client: ClientId, call: Submit, error: Exception) -> None:
        numbers = [new.number for new in call.requests]
        for number in numbers:
            self._abort(client, number)
        if isinstance(error, RequestError):
            refused = Refused(numbers=numbers, message=str(error), param=error.param, code=error.code)
        else:
            message = f"the request cannot be started: {_describe(error)}"
            refused = Refused(numbers=numbers, message=message, is_own_fault=True)
        self._send(client, refused)

    def _add(self, client: ClientId, new: NewRequest, constraint: Constraint | None) -> None:
        request = to_request(new, constraint)
        self.core.add(request)
        self._clients[client][new.number] = request
        self._owners[request] = client, new.number

    def _abort(self, client: ClientId, number: int) -> Request | None:
        """End a request without telling its client. None if it is not running."""
        self._waiting.pop((client, number), None)
        request = self._clients[client].pop(number, None)
        if request is not None:
            del self._owners[request]
            self.core.abort(request.request_id)
        return request

    def _abort_all(self, client: ClientId, *, tells: bool = False) -> None:
        """End all requests of a client. tells: send it their last outputs."""
        waiting = [number for owner, number in self._waiting if owner == client]
        for number in waiting:
            del self._waiting[client, number]
        ended = [(number, self._abort(client, number)) for number in list(self._clients[client])]
        outputs = [
            output_of(TokenOut(request, token_id=None, finish_reason="abort"), number)
            for number, request in ended
            if request is not None
        ]
        outputs += [Output(number, None, "abort") for number in waiting]
        if tells and outputs:
            self._send(client, Batch(time.monotonic(), [], [], outputs))
        self._report()

    def _forget(self, client: ClientId) -> None:
        self._abort_all(client)
        self._clients.pop(client, None)
        self._routers.discard(client)
        self._greeted.discard(client)

    def _report(self) -> None:
        if self._on_stats is not None:
            self._on_stats(self.core.stats)

    # ---- Adapters ----

    def loaded_adapters(self) -> list[AdapterInfo]:
        return [] if self.core.adapters is None else [use.info for use in self.core.adapters.uses()]

    def adapter_uses(self) -> list[AdapterUse]:
        return [] if self.core.adapters is None else self.core.adapters.uses()

    def _load_adapter(self, client: ClientId, ask: Ask) -> None:
        """Read an adapter's files on a thread of their own, while steps go on, and then make it known."""

        def read() -> None:
            outcome: Any
            try:
                outcome = require_adapters(self.core.adapters).read(ask.arguments[1])
            except Exception as error:
                outcome = error
            self._door.post(partial(self._finish_loading, client, ask, outcome))

        self._adapter_reader.submit(read)

    def _finish_loading(self, client: ClientId, ask: Ask, outcome: Any) -> None:
        """`outcome`: what was read, or an exception."""
        name, path, replaces = ask.arguments
        try:
            if isinstance(outcome, Exception):
                raise outcome
            adapters = require_adapters(self.core.adapters)
            value = adapters.add(name, path, outcome, replaces=bool(replaces))
        except Exception as error:  # it concerns the asker only
            self._send(client, _error_of(ask, error))
            return
        self._tell_adapters()
        self._send(client, Answer(ask.number, value))

    def unload_adapter(self, name: str) -> AdapterInfo:
        info = require_adapters(self.core.adapters).unload(name)
        self._tell_adapters()
        return info

    def _tell_adapters(self) -> None:
        for client in self._greeted:
            self._send(client, AdapterList(self.loaded_adapters()))

    # ---- Questions ----

    def _answer(self, ask: Ask) -> Answer:
        question = QUESTIONS.get(ask.question)
        if question is None:
            return Answer(ask.number, error=f"no question {ask.question!r}: known: {', '.join(QUESTIONS)}")
        try:
            return Answer(ask.number, question(self, *ask.arguments))
        except Exception as error:  # it concerns the asker only
            return _error_of(ask, error)

    def pool_states(self) -> bytes:
        return bytes(self.core.scheduler.block_manager.states())

    def audit(self) -> dict[str, int]:
        """Check the pool, and count what the engine holds. Raises InvariantError."""
        manager = self.core.scheduler.block_manager
        self.core.scheduler.audit()
        return {
            "free_blocks": sum(pool.num_free for pool in manager.pools),
            "all_blocks": sum(pool.num_blocks - 1 for pool in manager.pools),
            "live_states": 0 if manager.state_pool is None else manager.state_pool.num_live,
            "requests": self.core.scheduler.num_running + self.core.scheduler.num_waiting,
            "owned_requests": len(self._owners),
            "waiting_calls": len(self._waiting),
        }

    def latest_steps(self) -> list[Any]:
        return self._history.latest()

    def look_up_prefix(self, tokens: str, hash_seed: str) -> list[int]:
        """As `EngineCore.look_up_prefix`. tokens, hash_seed: in hexadecimal, the prompt's ids as int32."""
        prompt_ids = array("i", bytes.fromhex(tokens)).tolist()
        return self.core.look_up_prefix(prompt_ids, bytes.fromhex(hash_seed))

    def reset_prefix_cache(self, external: str = "") -> None:
        """Forget all cached prefixes; with `external` also the copies in the tiers."""
        self.core.scheduler.block_manager.reset(with_tiers=bool(external))
        self._report()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _error_of(ask: Ask, error: Exception) -> Answer:
    """The answer to a question that cannot be answered."""
    if isinstance(error, RequestError):
        return Answer(ask.number, error=str(error), is_refusal=True, param=error.param, code=error.code)
    logger.error("the question %s cannot be answered", ask.question, exc_info=error)
    return Answer(ask.number, error=_describe(error))


# What a client may ask: a name, and what answers it between two steps, quickly.
QUESTIONS: dict[str, Callable[..., Any]] = {
    "adapter_uses": EngineLoop.adapter_uses,
    "unload_adapter": EngineLoop.unload_adapter,
    "pool_states": EngineLoop.pool_states,
    "latest_steps": EngineLoop.latest_steps,
    "audit": EngineLoop.audit,
    "look_up_prefix": EngineLoop.look_up_prefix,
    "reset_prefix_cache": EngineLoop.reset_prefix_cache,
}
