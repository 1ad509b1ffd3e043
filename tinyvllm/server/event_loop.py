"""The server's event loop and HTTP parser: uvloop and httptools where they are installed (the extra `fast`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from importlib.util import find_spec
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on the fastest event loop that is installed, like asyncio.run."""
    loop_factory = None
    if find_spec("uvloop"):
        import uvloop

        loop_factory = uvloop.new_event_loop
    log.info("event loop: %s; HTTP parser: %s", "uvloop" if loop_factory else "asyncio", parser_name())
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


def parser_name() -> str:
    return "httptools" if find_spec("httptools") else "h11"


def http_protocol() -> type[asyncio.Protocol]:
    """The class of connections, for uvicorn.Config's `http`."""
    if parser_name() == "httptools":
        from tinyvllm.server.http1 import Http1Protocol

        return Http1Protocol
    from uvicorn.protocols.http.h11_impl import H11Protocol

    return H11Protocol
