"""`tinyvllm serve`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shlex
from typing import TYPE_CHECKING, Annotated

from typer import Option

from tinyvllm.cli import engine as engines
from tinyvllm.cli.flags import EngineFlags, Model
from tinyvllm.cli.models import require_model
from tinyvllm.cli.terminal import out, progress_bars
from tinyvllm.storage.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine

log = logging.getLogger(__name__)


def serve(
    *,
    model: Model = DEFAULT_MODEL,
    host: Annotated[
        str, Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0: all, for other machines too.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(metavar="NUMBER", help="TCP port to listen on; 0: any that is free.")] = 8000,
    served_model_name: Annotated[
        str | None, Option(metavar="NAME", help="What clients call the model. [default: MODEL]")
    ] = None,
    engine: EngineFlags,
) -> None:
    """Serve a model over HTTP, in OpenAI's format."""
    engine.apply()
    engine.make_config(model)  # refuses bad values before anything is begun

    from tinyvllm.server import serve as server

    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(contextlib.closing(server.bind(host, port)))
        files = require_model(model, pull=engine.pull)
        config = engine.make_config(model, served_model_name=served_model_name or files.name)
        address = server.address_of(sock)
        log.info(
            "%s loads; HTTP is up on %s, where /health is 503 until it is ready", config.served_model_name, address
        )
        bars = stack.enter_context(contextlib.ExitStack())  # apart: they end when the engine is ready
        report = bars.enter_context(progress_bars())

        def greet(ready: AsyncEngine) -> None:
            bars.close()
            _greet(ready, address)

        asyncio.run(server.serve(lambda: engines.start_engine(config, report), sock, on_ready=greet))


def _greet(engine: AsyncEngine, address: str) -> None:
    """Say where the server is, and how to try it."""
    name = engine.served_model_name
    out.print(f"{name} is served on {address} in OpenAI's format; Ctrl-C stops. Try:", highlight=False, markup=False)
    out.print(_curl_line(address, name, can_chat=engine.chat_template is not None), highlight=False, markup=False)


def _curl_line(address: str, model: str, *, can_chat: bool) -> str:
    """A command to paste into a shell."""
    body: dict[str, object] = {"model": model}
    if can_chat:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path = "completions"
        body["prompt"] = "The capital of France is"
    text = shlex.quote(json.dumps(body))
    return f"curl {address}/v1/{path} -H 'Content-Type: application/json' -d {text}"
