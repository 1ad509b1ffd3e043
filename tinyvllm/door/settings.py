"""What the door serves: its models, and how many of them may be loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tinyvllm.config import EngineConfig
from tinyvllm.errors import TinyvllmError
from tinyvllm.server.model_names import is_name_of

KEEP_ALIVE_S = 300.0  # Ollama's default
LOAD_TIMEOUT_S = 300.0  # Ollama's default
MAX_LOADED = 3  # unless --max-loaded says otherwise


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A model behind the door."""

    name: str  # in the API
    aliases: tuple[str, ...] = ()
    config: EngineConfig
    pinned: bool = False  # loaded at the start, and never unloaded
    keep_alive_s: float | None = None  # unloaded when idle for this long; inf: never; None: the door's setting
    memory_share: float | None = None  # of the device's memory, for weights and KV cache; None: an equal part
    environment: Mapping[str, str] = field(default_factory=dict)  # additional variables of its process: its device
    num_front_ends: int = 0  # processes for HTTP, next to one for the engine; 0: a single process for all

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are loaded with it."""
        return tuple(module.name for module in self.config.lora_modules)


@dataclass(frozen=True, kw_only=True)
class DoorSettings:
    """All models behind the door. Requests that name none go to the first."""

    models: Sequence[ModelSettings]
    max_loaded: int | None = None  # models that may be loaded at once; None: MAX_LOADED
    keep_alive_s: float = KEEP_ALIVE_S
    load_timeout_s: float = LOAD_TIMEOUT_S  # how long a request waits until its model is loaded

    def __post_init__(self) -> None:
        if not self.models:
            raise TinyvllmError("no model to serve: name one or more")
        if self.max_loaded is not None and self.max_loaded < 1:
            raise TinyvllmError(f"--max-loaded is {self.max_loaded}: give at least 1")
        if not 0 < self.load_timeout_s < math.inf:
            raise TinyvllmError(f"--load-timeout is {self.load_timeout_s}: give a number of seconds above 0")
        taken: list[str] = []
        for name in (name for model in self.models for name in (*model.names, *model.adapters)):
            if not name or is_name_of(name, taken):
                raise TinyvllmError(f"two models have the name {name!r}: give each a name of its own, as in NAME=MODEL")
            taken.append(name)
        pinned = [model.name for model in self.models if model.pinned]
        if len(pinned) > self.num_slots or (len(pinned) == self.num_slots < len(self.models)):
            raise TinyvllmError(
                f"{len(pinned)} models are pinned ({', '.join(pinned)}), and --max-loaded is {self.num_slots}, which "
                "leaves no room for the others: pin fewer, or raise --max-loaded"
            )

    @property
    def num_slots(self) -> int:
        """Models that may be loaded at once."""
        return min(self.max_loaded or MAX_LOADED, len(self.models))

    def find(self, name: str) -> ModelSettings | None:
        """The model that has a name, or an adapter of that name."""
        return next((one for one in self.models if is_name_of(name, (*one.names, *one.adapters))), None)

    def keep_alive_of(self, model: ModelSettings) -> float:
        return self.keep_alive_s if model.keep_alive_s is None else model.keep_alive_s
