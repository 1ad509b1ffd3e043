"""Where the engine runs: the interface of a thread of this process, and of processes of their own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from tinyvllm.config import Capacity, GenerationDefaults, ModelConfig
from tinyvllm.engine.admission import RequestFactory
from tinyvllm.engine.client import Client
from tinyvllm.engine.constraints import GrammarCompiler
from tinyvllm.scheduling.adapter_slots import AdapterInfo
from tinyvllm.scheduling.plan import StepStats
from tinyvllm.text.chat import ChatTemplate
from tinyvllm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What callers need of a loaded model: all that is about text, and the engine's limits."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    generation_defaults: GenerationDefaults
    factory: RequestFactory
    grammars: GrammarCompiler
    model_config: ModelConfig
    capacity: Capacity


class Host(Protocol):
    """One or more engines, and the clients that this process has of them, one an event loop."""

    num_engines: int
    is_remote: bool  # the engines run in other processes

    @property
    def loaded(self) -> Loaded | None:
        """None until the model is loaded."""

    @property
    def error(self) -> BaseException | None:
        """Why no engine runs: it failed to start, or has stopped on its own."""

    @property
    def is_ready(self) -> bool: ...

    async def wait_ready(self) -> None:
        """Return when requests can be served. Raises `error`."""

    def engine_stats(self) -> list[StepStats]: ...

    def adapters(self) -> list[AdapterInfo]:
        """Those that every engine has loaded."""

    def client(self, loop: asyncio.AbstractEventLoop) -> Client:
        """The client of the running event loop. Raises EngineDeadError if the engine takes no more work."""

    def clients(self) -> list[tuple[asyncio.AbstractEventLoop, Client]]: ...

    async def shutdown(self, drain_s: float) -> None: ...
