"""`tinyvllm serve`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

from typer import Option

from tinyvllm.cli import engine as engines
from tinyvllm.cli.door_flags import DoorFlags, Models, split_name
from tinyvllm.cli.flags import SERVED_STRETCH, EngineFlags
from tinyvllm.cli.greeting import Greeting
from tinyvllm.cli.models import require_model
from tinyvllm.cli.record_flags import RecordFlags
from tinyvllm.cli.server_flags import ListenFlags, ProcessFlags, ServerFlags
from tinyvllm.cli.terminal import Progress, progress_bars
from tinyvllm.config import DEVICE_VARIABLE
from tinyvllm.errors import TinyvllmError
from tinyvllm.processes import STOP_SIGNALS, hears_stop, require_memory_limit
from tinyvllm.server.output_queue import is_queued
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    import socket

    from tinyvllm.config import Capacity, EngineConfig
    from tinyvllm.door.settings import DoorSettings
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.server.settings import ServerSettings
    from tinyvllm.server.sockets import TlsFiles

log = logging.getLogger(__name__)

RECORDING_S = 30.0  # after the stop, for --profile and --trace to collect and write the recording


def serve(
    *,
    model: Models = None,
    served_model_name: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="The model's name in the API. Repeatable: further names are aliases. [default: MODEL]",
            show_default=False,
        ),
    ] = None,
    door: DoorFlags,
    listen: ListenFlags,
    http: ServerFlags,
    processes: ProcessFlags,
    record: RecordFlags,
    engine: EngineFlags,
) -> None:
    """Serve models over the APIs of OpenAI, Anthropic and Ollama.

    One model stays loaded. With several, or with any of --config, --keep-alive, --max-loaded, --load-timeout and --pin,
    each model is loaded at its first request, and unloaded when it is idle or when another one needs its memory."""
    from tinyvllm.server.child import prepare_process

    prepare_process()
    _end_on_signals()
    require_memory_limit()
    engine.apply()
    engine.make_config("")  # rejects bad values before anything starts
    settings = http.settings(local_host=listen.local_host)
    names = served_model_name or []
    _filter_logs()
    tls = listen.tls()
    models = model or ([] if door.config else [DEFAULT_MODEL])
    if door.applies(models):
        if record.is_on:
            raise TinyvllmError(
                "--profile and --trace work with a single model only: leave them out, or serve one model"
            )
        served = door.settings(models, names, engine, processes.num_front_ends_each())
        http.check_adapters([one.config for one in served.models])
        _serve_several(served, settings, tls, listen, access_log=http.access_log, log_level=engine.log_level)
        return
    http.check_adapters([engine.make_config("")])
    _serve_one(models[0], names, settings, tls, listen, http, processes, record, engine)


def _serve_one(
    model: str,
    names: list[str],
    settings: ServerSettings,
    tls: TlsFiles | None,
    listen: ListenFlags,
    http: ServerFlags,
    processes: ProcessFlags,
    record: RecordFlags,
    engine: EngineFlags,
) -> None:
    """Serve a model that stays loaded. names: what clients call it; the first is its name in answers."""
    from tinyvllm.server import sockets

    num_front_ends = processes.num_front_ends()
    with contextlib.ExitStack() as stack:
        sock = listen.bind()
        stack.enter_context(sockets.closing(sock))
        given_name, path = split_name(model)
        names = names or ([] if given_name is None else [given_name])
        files = require_model(path, pull=engine.pull)
        settings = dataclasses.replace(settings, model_aliases=tuple(names[1:]))
        config = engine.make_config(
            path,
            warm_up="background",
            max_step_stretch=SERVED_STRETCH,
            served_model_name=names[0] if names else files.name,
        )
        address = sockets.address_of(sock, has_tls=tls is not None)
        log.info(
            "loading %s; HTTP is up on %s, where /health is 503 until it is ready", config.served_model_name, address
        )
        _warn_if_open(sock, settings, address)
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


def _end_on_signals() -> None:
    """Until the server handles signals, a stop signal ends the command, as a clean stop does."""
    if is_queued():  # not in a test's process
        for number in STOP_SIGNALS:
            if hears_stop(number):
                signal.signal(number, lambda number, frame: sys.exit(0))


def _filter_logs() -> None:
    from tinyvllm.server.context import AccessLogFilter, RequestIdFilter

    for handler in logging.getLogger().handlers:
        handler.addFilter(AccessLogFilter())
        handler.addFilter(RequestIdFilter())


def _warn_if_open(sock: socket.socket, settings: ServerSettings, address: str) -> None:
    from tinyvllm.server import sockets

    if sockets.is_public(sock) and not settings.api_keys:
        log.warning("%s is open to everyone who can reach it: see --api-key-file", address)


def _serve_several(
    served: DoorSettings,
    settings: ServerSettings,
    tls: TlsFiles | None,
    listen: ListenFlags,
    *,
    access_log: bool,
    log_level: str,
) -> None:
    """Serve models through a door, each in a process of its own while it is loaded."""
    from tinyvllm.door.fleet import Plan
    from tinyvllm.door.serve import serve_door
    from tinyvllm.server import event_loop, sockets
    from tinyvllm.server.stop_clock import StopClock

    with contextlib.ExitStack() as stack:
        sock = listen.bind()
        stack.enter_context(sockets.closing(sock))
        address = sockets.address_of(sock, has_tls=tls is not None)
        _warn_if_open(sock, settings, address)
        greeting = Greeting(
            address=address,
            names=[model.name for model in served.models],
            apis=settings.apis,
            needs_key=bool(settings.api_keys),
            can_chat=True,
        )
        event_loop.run(
            serve_door(
                served,
                Plan(settings=settings, log_level=log_level),
                sock,
                on_serving=lambda server: greeting.show(),
                tls=tls,
                access_log=access_log,
                clock=StopClock(),
            )
        )


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
    from tinyvllm.server.stop_clock import StopClock

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
                clock=StopClock(RECORDING_S if served.record.is_on else 0.0),
            )
        )


def _serve_in_processes(
    served: Served, report: Progress, greet: Greet, processes: ProcessFlags, num_front_ends: int, engine: EngineFlags
) -> None:
    from tinyvllm.server import supervisor
    from tinyvllm.server.engine_placement import place_engines
    from tinyvllm.server.stop_clock import StopClock

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
    recordings = asyncio.run(
        supervisor.supervise(
            plan,
            served.sock,
            report,
            lambda can_chat: greet(can_chat=can_chat),
            clock=StopClock(RECORDING_S if served.record.is_on else 0.0),
        )
    )
    if served.record.is_on:
        served.record.show_all(recordings)
