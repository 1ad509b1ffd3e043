"""`tinyvllm serve`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

from typer import Option

from tinyvllm.cli import engine as engines
from tinyvllm.cli.flags import DEVICE_VARIABLE, EngineFlags, Model
from tinyvllm.cli.greeting import Greeting
from tinyvllm.cli.models import require_model
from tinyvllm.cli.record_flags import RecordFlags
from tinyvllm.cli.server_flags import ListenFlags, ProcessFlags, ServerFlags
from tinyvllm.cli.terminal import Progress, progress_bars
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    import socket

    from tinyvllm.config import Capacity, EngineConfig
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.server.settings import ServerSettings
    from tinyvllm.server.sockets import TlsFiles

log = logging.getLogger(__name__)


def serve(
    *,
    model: Model = DEFAULT_MODEL,
    served_model_name: Annotated[
        str | None, Option(metavar="NAME", help="The model's name in the API. [default: MODEL]")
    ] = None,
    listen: ListenFlags,
    http: ServerFlags,
    processes: ProcessFlags,
    record: RecordFlags,
    engine: EngineFlags,
) -> None:
    """Serve a model over HTTP with OpenAI's API."""
    engine.apply()
    engine.make_config(model)  # rejects bad values before anything starts
    settings = http.settings(local_host=listen.local_host)
    num_front_ends = processes.num_front_ends()

    from tinyvllm.server import sockets
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

        def greet(*, can_chat: bool, capacity: Capacity | None = None) -> None:
            bars.close()
            Greeting(
                address=address,
                names=(config.served_model_name or config.model,),
                apis=settings.apis,
                needs_key=bool(settings.api_keys),
                can_chat=can_chat,
                context_tokens=None if capacity is None else capacity.max_model_len,
                num_slots=None if capacity is None else capacity.max_num_seqs,
            ).show()

        served = Served(sock, config, settings, tls, http.access_log, record)
        if num_front_ends:
            _serve_in_processes(served, report, greet, processes, num_front_ends, engine)
        else:
            _serve_in_this_process(served, report, greet)


@dataclass(frozen=True)
class Served:
    """What is served, and how."""

    sock: socket.socket
    config: EngineConfig
    settings: ServerSettings
    tls: TlsFiles | None
    access_log: bool
    record: RecordFlags


class Greet(Protocol):
    """Says that the server is ready."""

    def __call__(self, *, can_chat: bool, capacity: Capacity | None = None) -> None: ...


def _serve_in_this_process(served: Served, report: Progress, greet: Greet) -> None:
    from tinyvllm.server import event_loop
    from tinyvllm.server import serve as server

    with contextlib.ExitStack() as recording:

        def on_ready(engine: AsyncEngine) -> None:
            recording.enter_context(served.record.recording())
            greet(can_chat=engine.chat_template is not None, capacity=engine.capacity)

        event_loop.run(
            server.serve(
                lambda: engines.start_engine(served.config, report),
                served.sock,
                on_ready=on_ready,
                settings=served.settings,
                tls=served.tls,
                access_log=served.access_log,
            )
        )


def _serve_in_processes(
    served: Served, report: Progress, greet: Greet, processes: ProcessFlags, num_front_ends: int, engine: EngineFlags
) -> None:
    from tinyvllm.server import supervisor
    from tinyvllm.server.engine_placement import place_engines

    plan = supervisor.ServePlan(
        engines=place_engines(served.config, processes.data_parallel_size, os.environ.get(DEVICE_VARIABLE)),
        settings=served.settings,
        num_front_ends=num_front_ends,
        restart_engine=processes.restart_engine,
        tls=served.tls,
        access_log=served.access_log,
        log_level=engine.log_level,
        records=served.record.is_on,
    )
    recordings = asyncio.run(supervisor.supervise(plan, served.sock, report, lambda can_chat: greet(can_chat=can_chat)))
    if served.record.is_on:
        served.record.show_all(recordings)
