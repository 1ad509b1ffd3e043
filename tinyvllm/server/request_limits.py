"""What the server takes in: a queue with an end, requests that may not last for ever, and the way it closes down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from tinyvllm.errors import RequestError, TinyvllmError
from tinyvllm.server.context import RequestContext

if TYPE_CHECKING:
    from tinyvllm.engine.output import Delta
    from tinyvllm.server.settings import ServerSettings


class QueueFullError(TinyvllmError):
    """As many requests or tokens wait as may: HTTP 429, and worth another try."""


class DrainingError(TinyvllmError):
    """The server is stopping and takes nothing new: HTTP 503, another server may."""


class RequestTimeoutError(TinyvllmError):
    """The request took longer than --request-timeout: HTTP 504."""


class Admission:
    """Counts what was let in and has not been answered, and refuses what would be too much.

    Lives on the server's event loop alone. A request that is queued is one beyond those that can run at once, so that
    the count is exact without asking the engine, which is always a step ahead or behind.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.num_seqs = 0  # sequences let in and not answered
        self.num_waiting_tokens = 0  # prompt tokens of those that have no output yet

    def check_room(self, max_num_seqs: int) -> None:
        """QueueFullError if not even one more sequence fits: before the prompt is read, which costs time."""
        limit = self._settings.max_num_queued_requests
        if limit is not None and self.num_seqs >= limit + max_num_seqs:
            raise self._too_many(self.num_seqs - max_num_seqs)

    def admit(self, context: RequestContext, num_seqs: int, num_tokens: int, max_num_seqs: int) -> None:
        """Count `num_seqs` sequences of one prompt of `num_tokens` for this request, until `release`.

        Raises QueueFullError when the queue has no room now, RequestError when it never would have.
        """
        limit, token_limit = self._settings.max_num_queued_requests, self._settings.max_num_queued_tokens
        if limit is not None and self.num_seqs + num_seqs > limit + max_num_seqs:
            if context.num_seqs + num_seqs > limit + max_num_seqs:
                raise RequestError(
                    f"the request has {context.num_seqs + num_seqs} sequences or more, but the server takes "
                    f"{limit + max_num_seqs} at most: send them in several requests, or raise "
                    "--max-num-queued-requests",
                    param="n" if num_seqs > 1 else "prompt",
                )
            raise self._too_many(max(0, self.num_seqs - max_num_seqs))
        # the first prompt always gets in: it waits for nobody, and a long one would otherwise never run
        if token_limit is not None and self.num_waiting_tokens and self.num_waiting_tokens + num_tokens > token_limit:
            raise QueueFullError(
                f"{self.num_waiting_tokens} prompt tokens are waiting and this prompt has {num_tokens}, but at most "
                f"{token_limit} may wait: try again later, or start the server with a larger --max-num-queued-tokens"
            )
        self.num_seqs += num_seqs
        context.num_seqs += num_seqs
        self.num_waiting_tokens += num_tokens
        context.num_waiting_tokens += num_tokens

    def prompt_computed(self, context: RequestContext, num_tokens: int) -> None:
        """A prompt of this request has its first output: its tokens wait no more."""
        num_tokens = min(num_tokens, context.num_waiting_tokens)
        self.num_waiting_tokens -= num_tokens
        context.num_waiting_tokens -= num_tokens

    def release(self, context: RequestContext) -> None:
        """The request has been answered, or its client has gone."""
        self.num_seqs -= context.num_seqs
        self.num_waiting_tokens -= context.num_waiting_tokens
        context.num_seqs = context.num_waiting_tokens = 0

    def _too_many(self, num_queued: int) -> QueueFullError:
        return QueueFullError(
            f"{num_queued} requests are queued, and at most {self._settings.max_num_queued_requests} may be: try again "
            "later, or start the server with a larger --max-num-queued-requests"
        )


class Drain:
    """The end of a server's life: whether it has begun, and how many requests are open."""

    def __init__(self) -> None:
        self.has_begun = False
        self.num_requests = 0  # that may ask for work and are not answered: all but GET, HEAD and OPTIONS

    def begin_request(self) -> None:
        self.num_requests += 1

    def end_request(self) -> None:
        self.num_requests -= 1


def timed_out(timeout_s: float) -> RequestTimeoutError:
    """What a request gets that is not complete in time."""
    return RequestTimeoutError(
        f"the request was not complete after {timeout_s:g} s: ask for fewer tokens, or start the server with a larger "
        "--request-timeout"
    )


async def until_timeout(
    deltas: AsyncGenerator[Delta, None], timeout_s: float, deadline_s: float
) -> AsyncGenerator[Delta, None]:
    """The same deltas until `deadline_s` on the event loop's clock, then RequestTimeoutError; `deltas` is closed."""
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    delta = await anext(deltas)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise timed_out(timeout_s) from error
            yield delta
    finally:
        await deltas.aclose()
