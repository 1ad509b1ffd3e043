"""Limits on requests: a bounded queue, a timeout, and the drain before the server stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tinyvllm.errors import RequestError, TinyvllmError
from tinyvllm.server.board import NUM_REQUESTS, NUM_SEQS, NUM_WAITING_TOKENS, Board
from tinyvllm.server.context import RequestContext

if TYPE_CHECKING:
    from tinyvllm.server.settings import ServerSettings

BODY_GRACE_S = 1.0  # how long a draining server waits for a whole body, so that most clients can read its refusal


class QueueFullError(TinyvllmError):
    """The queue of requests or of prompt tokens is full: HTTP 429, worth a retry."""


class DrainingError(TinyvllmError):
    """The server is stopping and takes no new requests: HTTP 503. Another server may take them."""


class RequestTimeoutError(TinyvllmError):
    """The request took longer than --request-timeout: HTTP 504."""


class Admission:
    """Counts the sequences that were admitted and not yet answered, and refuses those beyond the limits.

    The counts are those of all front-ends together, on their board. Sequences beyond those that can run at once count
    as queued: that is exact, whereas the engine's own counts are always a step ahead or behind.
    """

    def __init__(self, settings: ServerSettings, board: Board | None = None) -> None:
        self._settings = settings
        self._board = board or Board.in_memory()

    @property
    def num_seqs(self) -> int:
        """Sequences that were admitted and are not answered."""
        return self._board.sum(NUM_SEQS)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of admitted sequences without output."""
        return self._board.sum(NUM_WAITING_TOKENS)

    def check_room(self, max_num_seqs: int) -> None:
        """Raise QueueFullError if not even one more sequence fits. Called before the prompt is read."""
        limit = self._settings.max_num_queued_requests
        num_seqs = self.num_seqs
        if limit is not None and num_seqs >= limit + max_num_seqs:
            raise self._too_many(num_seqs - max_num_seqs)

    def admit(self, context: RequestContext, num_seqs: int, num_tokens: int, max_num_seqs: int) -> None:
        """Admit `num_seqs` sequences of one prompt of `num_tokens` tokens for this request, until `release`.

        Raises QueueFullError if the queue has no room now, RequestError if it never could have.
        """
        with self._board.locked():
            self._check_seqs(context, num_seqs, max_num_seqs)
            self._check_tokens(num_tokens)
            self._board.add(NUM_SEQS, num_seqs)
            self._board.add(NUM_WAITING_TOKENS, num_tokens)
        context.num_seqs += num_seqs
        context.num_waiting_tokens += num_tokens

    def _check_seqs(self, context: RequestContext, num_seqs: int, max_num_seqs: int) -> None:
        limit, num_admitted = self._settings.max_num_queued_requests, self.num_seqs
        if limit is None or num_admitted + num_seqs <= limit + max_num_seqs:
            return
        if context.num_seqs + num_seqs > limit + max_num_seqs:
            raise RequestError(
                f"the request has at least {context.num_seqs + num_seqs} sequences, but the server takes "
                f"{limit + max_num_seqs} at most: split it into several requests, or raise --max-num-queued-requests",
                param="n" if num_seqs > 1 else "prompt",
            )
        raise self._too_many(max(0, num_admitted - max_num_seqs))

    def _check_tokens(self, num_tokens: int) -> None:
        limit, num_waiting = self._settings.max_num_queued_tokens, self.num_waiting_tokens
        # with nothing waiting, any prompt is admitted: one longer than the limit would otherwise never run
        if limit is not None and num_waiting and num_waiting + num_tokens > limit:
            raise QueueFullError(
                f"{num_waiting} prompt tokens are waiting and this prompt has {num_tokens}, but at most {limit} may "
                "wait: try again later, or start the server with a larger --max-num-queued-tokens"
            )

    def prompt_computed(self, context: RequestContext, num_tokens: int) -> None:
        """A prompt of this request has its first output, so its tokens no longer wait."""
        num_tokens = min(num_tokens, context.num_waiting_tokens)
        self._board.add(NUM_WAITING_TOKENS, -num_tokens)
        context.num_waiting_tokens -= num_tokens

    def release(self, context: RequestContext) -> None:
        """Give back what the request holds, once it has been answered or its client has left. May be called again."""
        self._board.add(NUM_SEQS, -context.num_seqs)
        self._board.add(NUM_WAITING_TOKENS, -context.num_waiting_tokens)
        context.num_seqs = context.num_waiting_tokens = 0

    def _too_many(self, num_queued: int) -> QueueFullError:
        return QueueFullError(
            f"{num_queued} requests are queued, and at most {self._settings.max_num_queued_requests} may be: try again "
            "later, or start the server with a larger --max-num-queued-requests"
        )


class Drain:
    """Whether the server has begun to drain, and how many requests its front-ends have not answered yet."""

    def __init__(self, board: Board | None = None) -> None:
        self.has_begun = False  # also set by signal handlers
        self._board = board or Board.in_memory()
        self._begun_s: float | None = None  # on the loop's clock
        self._waits: set[asyncio.Timeout] = set()  # for bodies

    def observe(self) -> None:
        """Called at every tick. Limits the wait for bodies once the drain has begun: their requests will be refused."""
        if self.has_begun and self._begun_s is None:
            self._begun_s = asyncio.get_running_loop().time()
            end_s = self._begun_s + BODY_GRACE_S
            for wait in self._waits:
                when_s = wait.when()
                wait.reschedule(end_s if when_s is None else min(when_s, end_s))

    @contextlib.asynccontextmanager
    async def body_wait(self, timeout_s: float | None, start_s: float) -> AsyncIterator[None]:
        """Raises TimeoutError if the block, which waits for a part of a body, takes too long.

        start_s: when the request arrived, on the loop's clock.
        """
        end_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        if self._begun_s is not None:
            last_s = max(self._begun_s, start_s) + BODY_GRACE_S
            end_s = last_s if end_s is None else min(end_s, last_s)
        async with asyncio.timeout_at(end_s) as wait:
            self._waits.add(wait)
            try:
                yield
            finally:
                self._waits.discard(wait)

    @property
    def num_requests(self) -> int:
        """Unanswered requests that may need the engine: all but GET, HEAD and OPTIONS."""
        return self._board.sum(NUM_REQUESTS)

    def begin_request(self) -> None:
        self._board.add(NUM_REQUESTS, 1)

    def end_request(self) -> None:
        self._board.add(NUM_REQUESTS, -1)


def timed_out(timeout_s: float) -> RequestTimeoutError:
    """The error of a request that does not complete in time."""
    return RequestTimeoutError(
        f"the request did not complete within {timeout_s:g} s: ask for fewer tokens, or start the server with a larger "
        "--request-timeout"
    )
