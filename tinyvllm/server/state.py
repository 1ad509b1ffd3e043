"""The state that an app's handlers share, and their only way to the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from starlette.requests import Request

from tinyvllm.engine.beam import BeamSettings, generate_beams
from tinyvllm.errors import EngineDeadError
from tinyvllm.server.context import RequestContext, current
from tinyvllm.server.failures import NotReadyError
from tinyvllm.server.front_ends import FrontEnds
from tinyvllm.server.metrics import Metrics
from tinyvllm.server.request_limits import Admission, Drain, DrainingError, timed_out, until_timeout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tinyvllm.config import SamplingParams
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.engine.output import Delta
    from tinyvllm.server.settings import ServerSettings

log = logging.getLogger(__name__)

MAX_LOGGED_CHARS = 2000  # of a prompt, with --log-requests


class ServerState:
    """Owns the limits, counts and history around one engine. Used only on the server's event loop."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings, front_ends: FrontEnds | None = None) -> None:
        self.engine = engine
        self.settings = settings
        self.front_ends = front_ends or FrontEnds()
        self.board = self.front_ends.board
        self.admission = Admission(settings, self.board)
        self.drain = Drain(self.board)
        self.metrics = Metrics(engine, self.front_ends)
        self.start_s = time.monotonic()
        self._work_since_s = self.start_s  # monotonic clock: when a request last reached an idle engine

    def require_engine(self) -> None:
        """Raise EngineDeadError or NotReadyError unless the engine can take requests."""
        if self.engine.error is not None:
            raise EngineDeadError(f"the engine has stopped: {self.engine.error}. Restart the server")
        if not self.engine.is_ready:
            raise NotReadyError("the model is still loading or warming up, or the server is stopping: try again later")

    def require_ready(self) -> None:
        """Raise the error that keeps the server from taking another request. Called before the prompt is read."""
        self.require_engine()
        if self.drain.has_begun:
            raise DrainingError("the server is stopping and takes no new requests: use another, or try again later")
        self.admission.check_room(self.engine.capacity.max_num_seqs)

    @property
    def stalled_s(self) -> float | None:
        """How long the engine has had work without completing a step; None while the watchdog allows it."""
        limit_s = self.settings.watchdog_timeout_s
        if limit_s is None or self._is_idle:
            return None
        since_s = time.monotonic() - max(self.engine.stats().end_s, self._work_since_s)
        return since_s if since_s > limit_s else None

    @property
    def _is_idle(self) -> bool:
        """Whether the engine has nothing to do. Its output may still be on its way to slow readers."""
        stats = self.engine.stats()
        return not stats.num_running and not stats.num_waiting

    def _admit(self, num_seqs: int, num_tokens: int) -> RequestContext:
        """Admit the sequences of one prompt, for the request that is being handled. Raises if they are refused."""
        context = current()
        self.admission.admit(context, num_seqs, num_tokens, self.engine.capacity.max_num_seqs)
        if self._is_idle:
            self._work_since_s = time.monotonic()
        return context

    def generate(
        self,
        ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        arrival_s: float,
        priority: int = 0,
        beams: BeamSettings | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """The engine's deltas for one prompt, with the server's admission, deadline, metrics and log line.

        Raises at once if the prompt is not admitted. What it holds of the queue is released when the request ends.
        arrival_s: perf_counter() when the request arrived. beams: search params.n beams instead of sampling.
        """
        context = self._admit(params.n, len(ids))
        if self.settings.log_requests:
            self._log_request(ids, params, request_id)
        if beams is None:
            deltas = self.engine.generate(ids, params, request_id=request_id, priority=priority)
        else:
            deltas = generate_beams(self.engine, ids, params, beams, request_id=request_id, priority=priority)
        timeout_s = self.settings.request_timeout_s
        if timeout_s is not None:
            spent_s = time.perf_counter() - arrival_s
            deltas = until_timeout(deltas, timeout_s, asyncio.get_running_loop().time() + timeout_s - spent_s)
        return self.metrics.count_deltas(
            deltas,
            arrival_s=arrival_s,
            params=params,
            on_first=lambda: self.admission.prompt_computed(context, len(ids)),
        )

    async def embed(
        self, ids: list[int], pooling: str, *, request_id: str, arrival_s: float, priority: int = 0
    ) -> NDArray[np.float32]:
        """(hidden_size,): the engine's embedding of one text, subject to admission and the deadline."""
        context = self._admit(1, len(ids))
        timeout_s = self.settings.request_timeout_s
        remaining_s = None if timeout_s is None else timeout_s - (time.perf_counter() - arrival_s)
        try:
            async with asyncio.timeout(remaining_s):
                embedding = await self.engine.embed(ids, pooling, request_id=request_id, priority=priority)
        except TimeoutError as error:
            raise timed_out(timeout_s or 0.0) from error
        self.admission.prompt_computed(context, len(ids))
        return embedding

    def _log_request(self, ids: list[int], params: SamplingParams, request_id: str) -> None:
        text = self.engine.tokenizer.decode(ids[:MAX_LOGGED_CHARS], skip_special_tokens=False)
        shown = ascii(text if len(text) <= MAX_LOGGED_CHARS else text[:MAX_LOGGED_CHARS] + "...")
        log.info("received request %s: %d tokens, prompt: %s, params: %s", request_id, len(ids), shown, params)


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
