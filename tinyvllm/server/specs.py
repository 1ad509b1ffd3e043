"""What the supervisor tells each process when it starts it. Travels as JSON over the control link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from tinyvllm.config import EngineConfig
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.sockets import TlsFiles

LOAD_ENGINE = "tinyvllm.engine.loading:load_for_clients"


class Spec(Protocol):
    """What every process is told: its name, and how it logs. A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...

    @property
    def log_level(self) -> str: ...

    @property
    def log_prefix(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """An engine process."""

    index: int
    run_dir: str
    config: EngineConfig
    log_level: str
    log_prefix: str = ""
    cores: tuple[int, ...] | None = None  # the CPU cores that it may use; None: all
    load: str = LOAD_ENGINE  # module:function that loads the engine

    @property
    def name(self) -> str:
        return engine_name(self.index)


@dataclass(frozen=True, kw_only=True)
class FrontEndSpec:
    """A front-end."""

    index: int
    run_dir: str
    connections_fd: int  # connections arrive here
    config: EngineConfig
    num_engines: int
    num_front_ends: int
    large_lane: str | None  # the Unix socket of the front-end for large requests (large_lane.py)
    is_large_lane: bool  # this is the one
    settings: ServerSettings
    tls: TlsFiles | None
    access_log: bool
    log_level: str
    log_prefix: str = ""
    generation: int  # how many times this front-end has been started before

    @property
    def name(self) -> str:
        return front_end_name(self.index)


def engine_name(index: int) -> str:
    return f"engine {index}"


def front_end_name(index: int) -> str:
    return f"front-end {index}"


def client_name(index: int, generation: int) -> str:
    """The name of a front-end among the clients of an engine. A restarted one has another."""
    return f"front-end-{index}.{generation}"
