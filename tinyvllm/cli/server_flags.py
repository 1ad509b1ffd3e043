"""HTTP flags of `tinyvllm serve`: where it listens, what it accepts, who may call it. The names are vLLM's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from typer import Option

from tinyvllm.config import usable_cores
from tinyvllm.errors import TinyvllmError
from tinyvllm.server.settings import API_KEY_VARIABLE, APIS, LOOPBACK_HOSTS, Cors, ServerSettings, gather_api_keys

if TYPE_CHECKING:
    import socket

    from tinyvllm.config import EngineConfig
    from tinyvllm.server.sockets import TlsFiles

_STANDARD = ServerSettings()
MAX_FRONT_ENDS, MAX_ENGINES = 64, 64
MAX_DEFAULT_EACH = 2  # front-ends of each of several models, unless the user says otherwise


@dataclasses.dataclass(frozen=True)
class ListenFlags:
    """Where the server listens."""

    host: Annotated[
        str, Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0: all, so that other machines can connect.")
    ] = "127.0.0.1"
    port: Annotated[int, Option(metavar="NUMBER", help="TCP port to listen on; 0: any free one.")] = 8000
    uds: Annotated[
        str | None, Option(metavar="PATH", help="Unix socket to listen on, instead of an address and a port.")
    ] = None
    ssl_certfile: Annotated[
        str | None, Option(metavar="FILE", help="PEM file with the certificate for HTTPS and its chain.")
    ] = None
    ssl_keyfile: Annotated[
        str | None, Option(metavar="FILE", help="PEM file with its key. [default: in --ssl-certfile]")
    ] = None

    def bind(self) -> socket.socket:
        from tinyvllm.server import sockets

        return sockets.bind(self.host, self.port) if self.uds is None else sockets.bind_unix(self.uds)

    @property
    def local_host(self) -> str | None:
        """The address if only this machine can reach it, else None: a name other than localhost may be anything."""
        is_local = self.host in ("localhost", "::1") or self.host.startswith("127.")
        return self.host if is_local and self.uds is None else None

    def tls(self) -> TlsFiles | None:
        """The files for HTTPS after a check; None without --ssl-certfile. Raises TinyvllmError."""
        from tinyvllm.server.sockets import TlsFiles

        if self.ssl_certfile is None:
            if self.ssl_keyfile is not None:
                raise TinyvllmError("--ssl-keyfile is given without --ssl-certfile: give both")
            return None
        files = TlsFiles(self.ssl_certfile, self.ssl_keyfile)
        files.check()
        return files


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
    """How many processes serve."""

    api_server_count: Annotated[
        int | None,
        Option(
            metavar="COUNT",
            help="Front-ends: processes for HTTP and text, next to one for each engine; 0: a single process for all. "
            "[default: by the number of cores]",
        ),
    ] = None
    data_parallel_size: Annotated[
        int,
        Option(
            metavar="COUNT",
            help="Engines with a copy of the model each: on a GPU of its own, or on its share of the CPU's cores.",
        ),
    ] = 1
    restart_engine: Annotated[
        bool, Option("--restart-engine", help="Restart an engine that has died, instead of stopping the server.")
    ] = False

    def num_front_ends(self) -> int:
        """Raises TinyvllmError for values that do not fit together."""
        count, engines = self.api_server_count, self.data_parallel_size
        if count is not None and not 0 <= count <= MAX_FRONT_ENDS:
            raise TinyvllmError(f"--api-server-count is {count}: give 0 (one process) to {MAX_FRONT_ENDS}")
        if not 1 <= engines <= MAX_ENGINES:
            raise TinyvllmError(f"--data-parallel-size is {engines}: give 1 to {MAX_ENGINES}")
        needs_processes = engines > 1 or self.restart_engine
        if count == 0 and needs_processes:
            flag = "--data-parallel-size" if engines > 1 else "--restart-engine"
            raise TinyvllmError(
                f"--api-server-count 0 puts all in one process, but {flag} needs several: give 1 or more"
            )
        if count is None:
            count = default_front_ends(usable_cores())
        return max(count, 1) if needs_processes else count

    def num_front_ends_each(self) -> int:
        """Front-ends of each of several models. Raises TinyvllmError for flags that need a single model."""
        for is_given, flag in (
            (self.data_parallel_size > 1, "--data-parallel-size"),
            (self.restart_engine, "--restart-engine"),
        ):
            if is_given:
                raise TinyvllmError(f"{flag} works with a single model only: leave it out, or serve one model")
        count = self.num_front_ends()
        return count if self.api_server_count is not None else min(count, MAX_DEFAULT_EACH)


def default_front_ends(num_cores: int) -> int:
    """Front-ends on a machine with so many cores, next to the engine's process; 0: everything in one process.

    With up to 4 cores, an engine on the CPU uses them all, and a second process only takes turns with it. From there
    on, a front-end per 4 cores, at most 4: each passes on some 50,000 tokens a second, and an engine needs a core or
    two of its own.
    """
    return 0 if num_cores <= 4 else min(4, num_cores // 4)


def read_apis(given: str) -> tuple[str, ...]:
    """The APIs that --api names, in the usual order. Raises TinyvllmError for an unknown one, and for none."""
    names = {name.strip().lower() for name in given.split(",")} - {""}
    if not names or not names <= set(APIS):
        raise TinyvllmError(f"--api is {given!r}: give one or more of {', '.join(APIS)}, separated by commas")
    return tuple(name for name in APIS if name in names)


@dataclasses.dataclass(frozen=True)
class ServerFlags:
    """What the server accepts, how long it waits, who may call it, and what it logs."""

    api: Annotated[
        str,
        Option(
            metavar="NAMES",
            help=f"APIs to serve, separated by commas: any of {', '.join(APIS)}. Probes, metrics and other routes for "
            "the operator are always there.",
        ),
    ] = ",".join(APIS)
    api_key: Annotated[
        list[str] | None,
        Option(
            metavar="KEY",
            help="Require this key from clients. Repeatable. Other users of this machine can see flags, so keep "
            f"secrets in --api-key-file or ${API_KEY_VARIABLE}.",
        ),
    ] = None
    api_key_file: Annotated[
        str | None, Option(metavar="FILE", help="File of API keys, one per line; lines that start with # are comments.")
    ] = None
    allowed_origins: Annotated[
        list[str] | None,
        Option(metavar="ORIGIN", help="Let web pages of this origin call the server (CORS); *: all. Repeatable."),
    ] = None
    allowed_methods: Annotated[
        list[str] | None,
        Option(metavar="METHOD", help="HTTP method that those pages may use. Repeatable. [default: all]"),
    ] = None
    allowed_headers: Annotated[
        list[str] | None, Option(metavar="HEADER", help="Header that those pages may send. Repeatable. [default: all]")
    ] = None
    allow_credentials: Annotated[
        bool, Option("--allow-credentials", help="Let those pages send cookies and other credentials.")
    ] = False
    allowed_hosts: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="Host name that requests may address, such as a proxy's; *: any. Repeatable. "
            "[default: any; on a loopback address without keys only localhost, 127.0.0.1 and [::1]]",
        ),
    ] = None
    max_num_queued_requests: Annotated[
        int,
        Option(
            "--max-num-queued-requests",
            "--max-num-queued-reqs",
            metavar="COUNT",
            help="Maximum sequences that may wait beyond those that can run; more are rejected with 429.",
        ),
    ] = _STANDARD.max_num_queued_requests or 0
    max_num_queued_tokens: Annotated[
        int | None,
        Option(
            metavar="TOKENS",
            help="Maximum prompt tokens that may wait; more are rejected with 429. [default: no limit]",
        ),
    ] = None
    max_connections: Annotated[
        int | None,
        Option(
            metavar="COUNT",
            help="Maximum open connections; idle ones are closed to make room, then new ones are refused with 503. "
            "[default: as many as the limit of open files allows, at most 16384]",
            show_default=False,
        ),
    ] = None
    max_body_bytes: Annotated[
        int, Option(metavar="BYTES", help="Maximum size of a request body; larger ones are rejected with 413.")
    ] = _STANDARD.max_body_bytes
    clamp_max_tokens: Annotated[
        bool,
        Option(
            "--clamp-max-tokens",
            help="Shorten a max_tokens that exceeds the context to what fits, instead of answering 400.",
        ),
    ] = False
    request_timeout: Annotated[
        float,
        Option(metavar="SECONDS", help="Maximum time for a request, including its wait in the queue; 0: no limit."),
    ] = _STANDARD.request_timeout_s or 0.0
    idle_timeout: Annotated[
        float,
        Option(
            metavar="SECONDS",
            help="Maximum time that a client may neither send its body nor read its answer; 0: no limit.",
        ),
    ] = _STANDARD.idle_timeout_s or 0.0
    sse_keepalive_interval: Annotated[
        float,
        Option(metavar="SECONDS", help="Send a comment on streams that have been silent for this long; 0: never."),
    ] = _STANDARD.keepalive_s or 0.0
    watchdog_timeout: Annotated[
        float,
        Option(metavar="SECONDS", help="/health answers 503 while a step has been running longer than this; 0: never."),
    ] = _STANDARD.watchdog_timeout_s or 0.0
    shutdown_timeout: Annotated[
        float,
        Option(
            metavar="SECONDS", help="Maximum time for running requests to finish after a stop signal; 0: abort them."
        ),
    ] = _STANDARD.shutdown_timeout_s
    log_stats_interval: Annotated[
        float, Option(metavar="SECONDS", help="Interval between log lines with the engine's statistics; 0: never.")
    ] = _STANDARD.stats_interval_s or 0.0
    log_requests: Annotated[
        bool,
        Option("--log-requests", help="Log the prompts and settings of requests. Without it, no content is logged."),
    ] = False
    access_log: Annotated[bool, Option(help="Log a line for each HTTP request.")] = True
    allow_runtime_lora: Annotated[
        bool,
        Option(
            "--allow-runtime-lora",
            help="Allow every client to call POST /v1/load_lora_adapter, which reads directories of this machine, and "
            "/v1/unload_lora_adapter (vLLM's VLLM_ALLOW_RUNTIME_LORA_UPDATING).",
        ),
    ] = False
    enable_profiling: Annotated[
        bool, Option("--enable-profiling", help="Allow every client to call POST /start_profile and /stop_profile.")
    ] = False

    def check_adapters(self, configs: Iterable[EngineConfig]) -> None:
        """Raise TinyvllmError if adapters may be loaded, but no model can have any."""
        if self.allow_runtime_lora and not any(config.enable_lora for config in configs):
            raise TinyvllmError("--allow-runtime-lora is given, but adapters are off: give --enable-lora")

    def settings(self, *, local_host: str | None) -> ServerSettings:
        """The server's settings. local_host: its address if only this machine can reach it. Raises TinyvllmError."""
        keys = gather_api_keys(self.api_key or [], self.api_key_file, os.environ.get(API_KEY_VARIABLE))
        hosts: tuple[str, ...] | None = None
        if self.allowed_hosts:
            hosts = None if "*" in self.allowed_hosts else (*self.allowed_hosts, *LOOPBACK_HOSTS)
        elif local_host is not None and not keys:
            hosts = (*LOOPBACK_HOSTS, local_host)
        return ServerSettings(
            apis=read_apis(self.api),
            enable_profiling=self.enable_profiling,
            allow_runtime_lora=self.allow_runtime_lora,
            max_num_queued_requests=self.max_num_queued_requests,
            max_num_queued_tokens=self.max_num_queued_tokens,
            max_connections=self.max_connections,
            max_body_bytes=self.max_body_bytes,
            clamp_max_tokens=self.clamp_max_tokens,
            request_timeout_s=self.request_timeout or None,
            idle_timeout_s=self.idle_timeout or None,
            keepalive_s=self.sse_keepalive_interval or None,
            watchdog_timeout_s=self.watchdog_timeout or None,
            shutdown_timeout_s=self.shutdown_timeout,
            stats_interval_s=self.log_stats_interval or None,
            log_requests=self.log_requests,
            api_keys=keys,
            allowed_hosts=hosts,
            cors=Cors(
                origins=tuple(self.allowed_origins or ()),
                methods=tuple(self.allowed_methods or ("*",)),
                headers=tuple(self.allowed_headers or ("*",)),
                credentials=self.allow_credentials,
            ),
        )
