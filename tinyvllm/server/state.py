"""What the handlers of one app share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request

from tinyvllm.server.metrics import Metrics

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine


@dataclass(frozen=True)
class ServerState:
    engine: AsyncEngine
    metrics: Metrics


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
