"""The adapters of one engine, as its step loop and `LLM` see them: loading, unloading, and which requests use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from tinyvllm.config import LoRARequest
from tinyvllm.errors import ModelError, RequestError
from tinyvllm.scheduling.adapter_slots import AdapterInfo
from tinyvllm.scheduling.request import Request, Status
from tinyvllm.scheduling.scheduler import Scheduler

READ_S = 120.0  # how long a client waits for an adapter to be read


@dataclass(frozen=True)
class AdapterUse:
    """A loaded adapter, and how many requests run with it and wait to."""

    info: AdapterInfo
    num_running: int = 0
    num_waiting: int = 0


class Adapters(Protocol):
    """The part of execution.adapters.AdapterTable that the engine uses."""

    @property
    def infos(self) -> list[AdapterInfo]: ...

    def read(self, path: str) -> Any:
        """An adapter's matrices. May be called on any thread. Raises ModelError."""

    def add(
        self, name: str, path: str, weights: Any, *, replaces: bool = False, held: Collection[str] = ()
    ) -> AdapterInfo:
        """Raises RequestError if the name is taken and may not be replaced."""

    def remove(self, name: str) -> AdapterInfo:
        """Raises RequestError if it is unknown."""

    def forget_unused(self, used: Collection[str]) -> list[str]: ...

    def require(self, key: str) -> None:
        """Raise RequestError if no loaded adapter has this key."""

    def fetch(self, key: str, held: Collection[str]) -> bool:
        """Whether an adapter is in host memory. If not, begins to read it."""

    def wait(self, timeout_s: float) -> None:
        """Wait until what is read has been read."""

    def take_failures(self) -> dict[str, str]:
        """Why adapters could not be read again, by key, since the last call."""


class EngineAdapters:
    """Owns the loaded adapters of an engine. For the engine's thread, except `read`."""

    def __init__(self, table: Adapters, scheduler: Scheduler) -> None:
        self._table, self._scheduler = table, scheduler

    def read(self, path: str) -> Any:
        """An adapter's matrices, for `add`. May be called on any thread. Raises RequestError."""
        try:
            return self._table.read(path)
        except ModelError as error:
            raise RequestError(str(error), param="lora_path") from error

    def add(self, name: str, path: str, weights: Any, *, replaces: bool = False) -> AdapterInfo:
        """Make an adapter known by a name. Raises RequestError if the name is taken and may not be replaced."""
        slots = self._scheduler.adapters
        held = () if slots is None else slots.held
        info = self._table.add(name, path, weights, replaces=replaces, held=held)
        self._drop_unused()
        return info

    def unload(self, name: str) -> AdapterInfo:
        """Forget a name. Requests that use the adapter end with it. Raises RequestError if it is unknown."""
        info = self._table.remove(name)
        self._drop_unused()
        return info

    def require(self, key: str) -> None:
        """Raise RequestError if no loaded adapter has this key."""
        self._table.require(key)

    def wait(self, timeout_s: float) -> None:
        """Wait until the adapter that is being read for a request has been read."""
        self._table.wait(timeout_s)

    def take_unreadable(self) -> list[tuple[Request, str]]:
        """The requests whose adapter could not be read again since the last call, and why."""
        failures = self._table.take_failures()
        if not failures:
            return []
        return [
            (request, failures[request.adapter]) for request in self._scheduler.requests if request.adapter in failures
        ]

    @property
    def infos(self) -> list[AdapterInfo]:
        """The loaded adapters, in the order in which they were loaded. May be read on any thread."""
        return self._table.infos

    def uses(self) -> list[AdapterUse]:
        """The loaded adapters, in the order in which they were loaded."""
        counts = Counter(
            (request.adapter, request.status is Status.RUNNING)
            for request in self._scheduler.requests
            if request.adapter
        )
        return [AdapterUse(info, counts[info.key, True], counts[info.key, False]) for info in self._table.infos]

    def find(self, request: LoRARequest) -> AdapterInfo:
        """The adapter that a call of `LLM` asks for, which is loaded if it is not yet. Raises RequestError."""
        known = {info.name: info for info in self._table.infos}
        info = known.get(request.lora_name)
        if info is not None and request.lora_path in ("", info.path):
            return info
        if not request.lora_path:
            names = ", ".join(known) or "none is"
            raise RequestError(
                f"adapter {request.lora_name!r} is not loaded ({names}): give lora_path", param="lora_request"
            )
        return self.add(request.lora_name, request.lora_path, self.read(request.lora_path))

    def _drop_unused(self) -> None:
        """Free what belongs to adapters that have lost their name and that no request uses."""
        used = {request.adapter for request in self._scheduler.requests}
        for key in self._table.forget_unused(used):
            if self._scheduler.adapters is not None:
                self._scheduler.adapters.forget(key)


def require_adapters(adapters: EngineAdapters | None) -> EngineAdapters:
    """Raise RequestError if adapters are off."""
    if adapters is None:
        raise RequestError("adapters are off: start with --enable-lora (LLM(enable_lora=True))", param="model")
    return adapters
