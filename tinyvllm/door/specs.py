"""What the door tells a model's process, as JSON over the control link."""

from __future__ import annotations

from dataclasses import dataclass

from tinyvllm.config import EngineConfig
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.specs import LOAD_ENGINE

EXAMINE = "tinyvllm.door.needs:examine"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's own server, on a Unix socket."""

    name: str
    uds: str
    config: EngineConfig
    settings: ServerSettings
    log_level: str
    log_prefix: str = ""
    num_front_ends: int = 0  # processes; 0: a single process for all
    examine: str = EXAMINE  # module:function that says what the model needs
    load: str = LOAD_ENGINE  # module:function that loads the engine
