"""`tinyvllm serve`."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
from typing import TYPE_CHECKING, Annotated

from typer import Option

from tinyvllm.cli import engine as engines
from tinyvllm.cli.flags import EngineFlags, Model
from tinyvllm.cli.models import require_model
from tinyvllm.cli.record_flags import RecordFlags
from tinyvllm.cli.server_flags import ListenFlags, ServerFlags
from tinyvllm.cli.terminal import out, progress_bars
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine

log = logging.getLogger(__name__)


def serve(
    *,
    model: Model = DEFAULT_MODEL,
    served_model_name: Annotated[
        str | None, Option(metavar="NAME", help="The model's name in the API. [default: MODEL]")
    ] = None,
    listen: ListenFlags,
    http: ServerFlags,
    record: RecordFlags,
    engine: EngineFlags,
) -> None:
    """Serve a model over HTTP with OpenAI's API."""
    engine.apply()
    engine.make_config(model)  # rejects bad values before anything starts
    settings = http.settings(local_host=listen.local_host)

    from tinyvllm.server import event_loop, sockets
    from tinyvllm.server import serve as server
    from tinyvllm.server.context import QuietPollsFilter, RequestIdFilter

    for handler in logging.getLogger().handlers:
        handler.addFilter(QuietPollsFilter())
        handler.addFilter(RequestIdFilter())
    tls = listen.tls()
    with contextlib.ExitStack() as stack:
        sock = listen.bind()
        stack.enter_context(sockets.closing(sock))
        files = require_model(model, pull=engine.pull)
        config = engine.make_config(model, warm_up="background", served_model_name=served_model_name or files.name)
        address = sockets.address_of(sock, has_tls=tls is not None)
        log.info(
            "loading %s; HTTP is up on %s, where /health is 503 until it is ready", config.served_model_name, address
        )
        if sockets.is_public(sock) and not settings.api_keys:
            log.warning("%s is open to everyone who can reach it: see --api-key-file", address)
        bars = stack.enter_context(contextlib.ExitStack())  # a stack of its own: the bars end when the engine is ready
        report = bars.enter_context(progress_bars())

        def greet(ready: AsyncEngine) -> None:
            bars.close()
            stack.enter_context(record.recording())
            _greet(ready, address, needs_key=bool(settings.api_keys))

        event_loop.run(
            server.serve(
                lambda: engines.start_engine(config, report),
                sock,
                on_ready=greet,
                settings=settings,
                tls=tls,
                access_log=http.access_log,
            )
        )


def _greet(engine: AsyncEngine, address: str, *, needs_key: bool) -> None:
    """Print where the server listens and how to try it."""
    name = engine.served_model_name
    page = "" if address.startswith("unix:") else f" and a web page on {address}/"
    out.print(
        f"{name} is served on {address} with OpenAI's API{page}; Ctrl-C stops it. Try:", highlight=False, markup=False
    )
    line = _curl_line(address, name, can_chat=engine.chat_template is not None, needs_key=needs_key)
    out.print(line, highlight=False, markup=False)


def _curl_line(address: str, model: str, *, can_chat: bool, needs_key: bool) -> str:
    """A command to paste into a shell, with KEY in place of a real key, which must not reach a log."""
    body: dict[str, object] = {"model": model}
    if can_chat:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path = "completions"
        body["prompt"] = "The capital of France is"
    target = f"{address}/v1/{path}"
    if address.startswith("unix:"):
        target = f"--unix-socket {shlex.quote(address.removeprefix('unix:'))} http://localhost/v1/{path}"
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    text = shlex.quote(json.dumps(body))
    return f"curl {target}{key} -H 'Content-Type: application/json' -d {text}"
