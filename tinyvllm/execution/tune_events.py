"""The messages between the parent and the worker of a search."""

from __future__ import annotations

from dataclasses import dataclass

from tinyvllm.config import EngineConfig, ModelConfig, ModelFiles


@dataclass(frozen=True)
class Job:
    """What to tune: a model's files, or a shape with random weights of `kind`. `buckets`: names; (): all."""

    config: EngineConfig
    files: ModelFiles | None = None
    shape: ModelConfig | None = None
    kind: str = ""
    buckets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """A worker's message. `what`: ready (bucket names in `buckets`), begin, end, saved, done or failed."""

    what: str
    path: str = ""
    buckets: tuple[str, ...] = ()
    bucket: str = ""
    kernel: str = ""
    name: str = ""
    chosen: tuple[tuple[str, int], ...] = ()
    seconds: float | None = None
    message: str = ""
