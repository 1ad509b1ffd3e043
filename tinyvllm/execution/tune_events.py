"""The messages between the parent and the worker of a search."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinyvllm.config import EngineConfig, ModelConfig, ModelFiles


@dataclass(frozen=True)
class Job:
    """What to tune: a model's files, or a shape with random weights of `kind`. `buckets`: names; (): all. `end_s`: when
    to stop (time.monotonic). `is_again`: try again what gained nothing before."""

    config: EngineConfig
    files: ModelFiles | None = None
    shape: ModelConfig | None = None
    kind: str = ""
    buckets: tuple[str, ...] = ()
    end_s: float = math.inf
    is_again: bool = False


@dataclass(frozen=True)
class Event:
    """A worker's message. `what`: stage (its name in `bucket`, `place` of `total` done), ready (bucket names in
    `buckets`), bucket (its search begins), prepare, begin and end (with a Trial's fields; a candidate is prepared, then
    run), saved (`message`: why a bucket has no results), done, stopped (at `end_s`), refused (`message`: an
    error of ours, which needs no more words) or failed (`message`: of what)."""

    what: str
    path: str = ""
    buckets: tuple[str, ...] = ()
    bucket: str = ""
    kernel: str = ""
    name: str = ""
    chosen: tuple[tuple[str, int], ...] = ()
    place: int = 0
    total: int = 0
    seconds: float | None = None
    before_s: float = 0.0
    is_kept: bool = False
    message: str = ""
