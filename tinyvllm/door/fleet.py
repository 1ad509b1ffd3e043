"""Runs the models' processes and holds the requests that wait for them, as the policy decides."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tinyvllm.door.policy import Action, Admit, Load, Measure, Need, Policy, Refuse, Rule, Start, State, Ticket, Unload
from tinyvllm.door.settings import DoorSettings, ModelSettings
from tinyvllm.door.specs import EXAMINE, ModelSpec
from tinyvllm.errors import TinyvllmError
from tinyvllm.server.child import write_pids
from tinyvllm.server.control import Message
from tinyvllm.server.failures import DoesNotFitError, LoadFailedError
from tinyvllm.server.process import Process, start_process
from tinyvllm.server.relay import PeerGoneError, fetch
from tinyvllm.server.request_limits import DrainingError, QueueFullError
from tinyvllm.server.settings import Cors, ServerSettings
from tinyvllm.server.shelf import LoadState, ShelvedModel
from tinyvllm.server.specs import LOAD_ENGINE

log = logging.getLogger(__name__)

MODULE = "tinyvllm.door.model_process"
MAX_TIMER_S = 86_400.0
END_S = 10.0  # how long a model's process may take to end, before it is killed
CLOSE_S, KILL_S = 1.8, 1.0  # the same when the server stops, and until a killed one is gone

STATES: Mapping[State, LoadState] = {
    State.UNLOADED: "unloaded",
    State.STARTING: "loading",
    State.EXAMINED: "loading",
    State.LOADING: "loading",
    State.READY: "ready",
    State.ENDING: "unloaded",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the models' processes are started."""

    settings: ServerSettings  # the door's own
    log_level: str = "info"
    module: str = MODULE
    examine: str = EXAMINE
    load: str = LOAD_ENGINE


@dataclass
class Counts:
    """Counts of one model, for the metrics."""

    loads: int = 0
    failed_loads: int = 0
    load_s: float = 0.0  # of all loads together
    unloads: dict[str, int] = field(default_factory=lambda: {"idle": 0, "evicted": 0, "died": 0})


@dataclass
class _Facts:
    """What a model reported when it was loaded. It remains valid after the model is unloaded."""

    root: str = ""
    max_model_len: int | None = None
    num_device_bytes: int | None = None
    can_chat: bool = True  # until it is known


def settings_behind(settings: ServerSettings, model: ModelSettings) -> ServerSettings:
    """Settings of a model's own server. The door checks access, and drains before it stops a model."""
    return dataclasses.replace(
        settings, api_keys=(), cors=Cors(), allowed_hosts=None, shutdown_timeout_s=0.0, model_aliases=model.aliases
    )


def _load_failed(model: str, error: str) -> LoadFailedError:
    return LoadFailedError(f"the model {model!r} could not be loaded: {error}")


class Child:
    """A model's process, and where it listens."""

    def __init__(self, process: Process, uds: str, started_s: float) -> None:
        self.process = process
        self.uds = uds
        self.started_s = started_s
        self.error = ""  # why it could not load its model
        self.stage = "starting"  # of its start, for those who wait
        self.unload_reason: str | None = None
        self.is_eviction = False


class Waiting:
    """A request that waits for its model, or uses it."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.admitted: asyncio.Future[Child] = asyncio.get_running_loop().create_future()


class Fleet:
    """Owns the models' processes. Used on one event loop."""

    def __init__(self, settings: DoorSettings, plan: Plan, run_dir: Path) -> None:
        self.settings = settings
        self._by_name = {model.name: model for model in settings.models}
        self.counts = {name: Counts() for name in self._by_name}
        self.facts = {name: _Facts() for name in self._by_name}
        self.children: dict[str, Child] = {}
        self._plan = plan
        self._run_dir = run_dir
        self._numbers = itertools.count()
        self._policy = Policy(
            [
                Rule(model.name, settings.keep_alive_of(model), model.pinned, model.memory_share)
                for model in settings.models
            ],
            settings.num_slots,
        )
        self._waiting: dict[Ticket, Waiting] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closing = False
        self.created = int(time.time())

    def start(self) -> None:
        """Load the pinned models. Call it once, on the event loop."""
        self._decide()

    # ---- Requests ----

    def enter(self, model: str, keep_alive_s: float | None = None) -> Waiting:
        """Register a request for `model`; `leave` must be called when it ends. Raises TinyvllmError if it cannot
        even wait."""
        entry, now_s = self._policy.entries[model], time.monotonic()
        if self._is_closing:
            raise DrainingError("the server is stopping and takes no new requests: use another, or try again later")
        if error := self._policy.error_of(model, now_s):
            raise _load_failed(model, error) if entry.num_failures else DoesNotFitError(error)
        limit = self._plan.settings.max_num_queued_requests
        if limit is not None and len(entry.waiting) >= max(1, limit):
            raise QueueFullError(
                f"{len(entry.waiting)} requests wait until {model!r} is loaded, and at most {max(1, limit)} may: try "
                "again later, or start the server with a larger --max-num-queued-requests"
            )
        waiting = Waiting(self._policy.enter(model, now_s, keep_alive_s))
        self._waiting[waiting.ticket] = waiting
        self._decide()
        return waiting

    def leave(self, waiting: Waiting) -> None:
        self._waiting.pop(waiting.ticket, None)
        if waiting.admitted.done() and not waiting.admitted.cancelled():
            waiting.admitted.exception()  # it has been seen, or nobody is interested any more
        waiting.admitted.cancel()
        self._policy.leave(waiting.ticket, time.monotonic())
        self._decide()

    def why_waiting(self, model: str) -> str:
        """For a request that has waited too long."""
        state, child = self._policy.entries[model].state, self.children.get(model)
        if state in (State.STARTING, State.LOADING) and child is not None:
            return (
                f"the model {model!r} is still being loaded ({child.stage}): try again later, or raise --load-timeout"
            )
        return self._policy.explain(model)

    def state_of(self, model: str) -> State:
        return self._policy.entries[model].state

    def num_waiting(self, model: str) -> int:
        return len(self._policy.entries[model].waiting)

    def num_running(self, model: str) -> int:
        return len(self._policy.entries[model].running)

    def loaded(self) -> dict[str, Child]:
        """The processes of the models that are loaded."""
        return {name: child for name, child in self.children.items() if self.state_of(name) is State.READY}

    def models(self) -> Sequence[ShelvedModel]:
        """All models, for the routes that list them: the door is their Shelf."""
        found = []
        for model in self.settings.models:
            shelved = self._shelved(model)
            found.append(shelved)
            found += [shelved.adapter(module.name, module.path) for module in model.config.lora_modules]
        return found

    def _shelved(self, model: ModelSettings) -> ShelvedModel:
        entry, facts = self._policy.entries[model.name], self.facts[model.name]
        state = STATES[entry.state]
        expires_s = None
        if state == "ready" and entry.expires_s < math.inf:
            idle_s = time.monotonic() - entry.used_s if entry.is_idle else 0.0
            expires_s = time.time() + max(0.0, entry.keep_alive_s - idle_s)
        return ShelvedModel(
            name=model.name,
            aliases=model.aliases,
            model=model.config.model,
            root=facts.root or model.name,
            created=self.created,
            state="failed" if state == "unloaded" and entry.num_failures else state,
            max_model_len=facts.max_model_len,
            num_device_bytes=facts.num_device_bytes if state == "ready" else None,
            chat_template=model.config.chat_template,
            reasoning_parser=model.config.reasoning_parser,
            expires_s=expires_s,
        )

    # ---- What the policy decides ----

    def _decide(self) -> None:
        """Carry out the policy's actions, and set the timer for the next ones."""
        if self._is_closing:
            return
        now_s = time.monotonic()
        for action in self._policy.actions(now_s):
            self._do(action)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake_up_s = self._policy.wake_up_s(now_s)
        if wake_up_s < math.inf:
            delay_s = max(0.0, wake_up_s - now_s) + 1e-3
            self._timer = self._later(min(delay_s, MAX_TIMER_S), self._decide)

    def _do(self, action: Action) -> None:
        match action:
            case Start():
                self._spawn(self._run(self._by_name[action.model]))
            case Measure():
                self._tell(action.model, "measure")
            case Load():
                log.info("%s: loading with up to %.2f GiB of device memory", action.model, action.num_bytes / 2**30)
                self._tell(action.model, "load", num_bytes=action.num_bytes)
                child = self.children[action.model]
                self._later(self.settings.load_timeout_s, functools.partial(self._limit_load, child))
            case Admit():
                child = self.children[action.tickets[0].model]
                for waiting in self._of(action.tickets):
                    waiting.admitted.set_result(child)
            case Unload():
                self._end(action.model, action.reason, is_eviction=action.is_eviction)
            case Refuse():
                for waiting in self._of(action.tickets):
                    waiting.admitted.set_exception(DoesNotFitError(action.reason))

    def _of(self, tickets: tuple[Ticket, ...]) -> list[Waiting]:
        """The requests of these tickets that still wait."""
        found = [self._waiting[ticket] for ticket in tickets if ticket in self._waiting]
        return [waiting for waiting in found if not waiting.admitted.done()]

    def _tell(self, model: str, kind: str, **facts: object) -> None:
        if model in self.children:
            self.children[model].process.send(kind, **facts)

    def _end(self, model: str, reason: str, *, is_eviction: bool) -> None:
        log.info("%s: unloading, because %s", model, reason)
        child = self.children.get(model)
        if child is None:  # its process is just being started
            return
        child.unload_reason, child.is_eviction = reason, is_eviction
        child.process.send("stop")
        self._later(END_S, functools.partial(self._kill, child))

    def _kill(self, child: Child) -> None:
        if self.children.get(child.process.name) is child:
            log.error("%s does not end: killing it", child.process.name)
            child.process.kill()

    def _limit_load(self, child: Child) -> None:
        """End a load that takes too long, because other models wait for it."""
        limit_s, model = self.settings.load_timeout_s, child.process.name
        if self.children.get(model) is child and self.state_of(model) is State.LOADING:
            child.error = f"it was not loaded within {limit_s:g} s ({child.stage}): raise --load-timeout"
            child.process.kill()

    # ---- Processes ----

    async def _run(self, model: ModelSettings) -> None:
        """One process of a model, from its start to its end."""
        name, error, was_ready = model.name, "", False
        try:
            child = await self._start(model)
        except Exception as failure:
            self._ended(name, str(failure), None, was_ready=False)
            if isinstance(failure, TinyvllmError):
                log.error("%s: %s", name, failure)
                return
            raise
        try:
            async for message in child.process.messages():
                await self._hear(model, child, message)
            was_ready = self.state_of(name) is State.READY
            self._policy.lost(name)
            end = await child.process.how_it_ended()
            error = child.error or f"its process {end}"
            if child.unload_reason is None and not self._is_closing:
                log.error("%s: %s", name, error if not was_ready else f"its process {end}: its requests are ended")
            await child.process.wait()
        finally:
            child.process.kill()
            child.process.close()
            del self.children[name]
            self._write_pids()
            self._ended(name, error, child, was_ready=was_ready)

    async def _start(self, model: ModelSettings) -> Child:
        plan, uds = self._plan, str(self._run_dir / f"model-{next(self._numbers)}")
        spec = ModelSpec(
            name=model.name,
            uds=uds,
            config=model.config,
            settings=settings_behind(plan.settings, model),
            log_level=plan.log_level,
            num_front_ends=model.num_front_ends,
            examine=plan.examine,
            load=plan.load,
        )
        process = await start_process(plan.module, spec, environment=model.environment)
        child = self.children[model.name] = Child(process, uds, time.monotonic())
        self._write_pids()
        if self._is_closing or self.state_of(model.name) is State.ENDING:
            process.send("stop")
        return child

    async def _hear(self, model: ModelSettings, child: Child, message: Message) -> None:
        match message["kind"]:
            case "need":
                self._policy.examined(model.name, msgspec.convert(message["need"], Need))
                self._decide()
            case "progress":
                child.stage = f"{message['stage']} {message['done']} of {message['total']}"
            case "ready":
                await self._loaded(model, child)
            case "failed":
                child.error = message["error"]

    async def _loaded(self, model: ModelSettings, child: Child) -> None:
        facts = self.facts[model.name]
        try:
            card = msgspec.json.decode(await fetch(child.uds, "/v1/models"))["data"][0]
            state = msgspec.json.decode(await fetch(child.uds, "/engine/state"))
        except (PeerGoneError, msgspec.DecodeError, LookupError) as error:
            child.error = f"it does not answer: {error}"
            child.process.kill()
            return
        facts.root, facts.max_model_len = card["root"], card["max_model_len"]
        facts.num_device_bytes, facts.can_chat = sum(state["memory"].values()) or None, state["can_chat"]
        load_s = time.monotonic() - child.started_s
        self.counts[model.name].loads += 1
        self.counts[model.name].load_s += load_s
        log.info("%s: loaded in %.1f s", model.name, load_s)
        self._policy.loaded(model.name, time.monotonic(), facts.num_device_bytes)
        self._decide()

    def _ended(self, model: str, error: str, child: Child | None, *, was_ready: bool) -> None:
        counts = self.counts[model]
        failed = self._policy.ended(model, time.monotonic(), error)
        if child is not None and child.unload_reason is not None:
            counts.unloads["evicted" if child.is_eviction else "idle"] += 1
        elif was_ready:
            counts.unloads["died"] += 1
        else:
            counts.failed_loads += 1
        for waiting in self._of(failed):
            waiting.admitted.set_exception(_load_failed(model, error))
        self._decide()

    # ---- The end ----

    def refuse_waiting(self) -> None:
        """The server is stopping: load nothing more, and refuse the requests that wait."""
        self._is_closing = True
        for waiting in list(self._waiting.values()):
            if not waiting.admitted.done():
                waiting.admitted.set_exception(
                    DrainingError("the server is stopping and loads no more models: use another, or try again later")
                )

    async def close(self) -> None:
        """End every process."""
        self.refuse_waiting()
        if self._timer is not None:
            self._timer.cancel()
        for child in self.children.values():
            child.process.send("stop")
        if self._tasks and (await asyncio.wait(self._tasks, timeout=CLOSE_S))[1]:
            for child in self.children.values():
                log.error("%s does not end: killing it", child.process.name)
                child.process.kill()
            await asyncio.wait(self._tasks, timeout=KILL_S)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())  # no request's
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _later(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(delay_s, call, context=contextvars.Context())

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an unexpected error of the door", exc_info=error)

    def _write_pids(self) -> None:
        write_pids(
            self._run_dir,
            {"door": os.getpid(), **{name: child.process.pid for name, child in self.children.items()}},
        )
