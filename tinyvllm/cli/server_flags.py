"""Flags of `tinyvllm serve` that are about HTTP: where it listens, what it takes in, who may ask. Names are vLLM's."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated

from typer import Option

from tinyvllm.errors import TinyvllmError
from tinyvllm.server.settings import API_KEY_VARIABLE, LOOPBACK_HOSTS, Cors, ServerSettings, gather_api_keys

if TYPE_CHECKING:
    import socket

    from tinyvllm.server.sockets import TlsFiles

_STANDARD = ServerSettings()


@dataclasses.dataclass(frozen=True)
class ListenFlags:
    """Where the server listens."""

    host: Annotated[
        str, Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0: all, for other machines too.")
    ] = "127.0.0.1"
    port: Annotated[int, Option(metavar="NUMBER", help="TCP port to listen on; 0: any that is free.")] = 8000
    uds: Annotated[
        str | None, Option(metavar="PATH", help="A Unix socket to listen on, instead of an address and a port.")
    ] = None
    ssl_certfile: Annotated[
        str | None, Option(metavar="FILE", help="A PEM file with the certificate for HTTPS, and the chain behind it.")
    ] = None
    ssl_keyfile: Annotated[
        str | None, Option(metavar="FILE", help="A PEM file with its key. [default: in --ssl-certfile]")
    ] = None

    def bind(self) -> socket.socket:
        from tinyvllm.server import sockets

        return sockets.bind(self.host, self.port) if self.uds is None else sockets.bind_unix(self.uds)

    @property
    def local_host(self) -> str | None:
        """The address, if it is one that only this machine can reach. A name other than localhost may be anything."""
        is_local = self.host in ("localhost", "::1") or self.host.startswith("127.")
        return self.host if is_local and self.uds is None else None

    def tls(self) -> TlsFiles | None:
        """The files for HTTPS, checked; None without them."""
        from tinyvllm.server.sockets import TlsFiles

        if self.ssl_certfile is None:
            if self.ssl_keyfile is not None:
                raise TinyvllmError("--ssl-keyfile is given without --ssl-certfile: give both")
            return None
        files = TlsFiles(self.ssl_certfile, self.ssl_keyfile)
        files.check()
        return files


@dataclasses.dataclass(frozen=True)
class ServerFlags:
    """What the server takes in, how long it waits, who may ask, what it logs."""

    api_key: Annotated[
        list[str] | None,
        Option(
            metavar="KEY",
            help="Ask clients for a key; may be given several times. Other users of this machine can see flags: "
            f"--api-key-file and ${API_KEY_VARIABLE} are for secrets.",
        ),
    ] = None
    api_key_file: Annotated[
        str | None, Option(metavar="FILE", help="A file of keys, one a line; # begins a comment line.")
    ] = None
    allowed_origins: Annotated[
        list[str] | None,
        Option(metavar="ORIGIN", help="Let web pages of this origin call the server (CORS); * for all. Several times."),
    ] = None
    allowed_methods: Annotated[
        list[str] | None, Option(metavar="METHOD", help="HTTP methods that those pages may use. [default: all]")
    ] = None
    allowed_headers: Annotated[
        list[str] | None, Option(metavar="HEADER", help="Headers that those pages may send. [default: all]")
    ] = None
    allow_credentials: Annotated[
        bool, Option("--allow-credentials", help="Let those pages send cookies and the like.")
    ] = False
    allowed_hosts: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="Names that clients may call the server by, as a proxy's; * for any. Several times. "
            "[default: any; without a key on a loopback address: localhost, 127.0.0.1, [::1]]",
        ),
    ] = None
    max_num_queued_requests: Annotated[
        int,
        Option(
            "--max-num-queued-requests",
            "--max-num-queued-reqs",
            metavar="COUNT",
            help="Most sequences that may wait beyond those that can run; more are refused with 429.",
        ),
    ] = _STANDARD.max_num_queued_requests or 0
    max_num_queued_tokens: Annotated[
        int | None,
        Option(metavar="TOKENS", help="Most prompt tokens that may wait; more are refused with 429. [default: any]"),
    ] = None
    max_body_bytes: Annotated[int, Option(metavar="BYTES", help="Largest body of a request; 413 beyond.")] = (
        _STANDARD.max_body_bytes
    )
    request_timeout: Annotated[
        float, Option(metavar="SECONDS", help="Longest that a request may take, queue and all; 0: any time.")
    ] = _STANDARD.request_timeout_s or 0.0
    idle_timeout: Annotated[
        float,
        Option(
            metavar="SECONDS", help="Longest that a client may neither send its body nor read its answer; 0: any time."
        ),
    ] = _STANDARD.idle_timeout_s or 0.0
    sse_keepalive_interval: Annotated[
        float,
        Option(metavar="SECONDS", help="Send a comment in streams that have had nothing to say for so long; 0: none."),
    ] = _STANDARD.keepalive_s or 0.0
    watchdog_timeout: Annotated[
        float,
        Option(metavar="SECONDS", help="/health turns to 503 when a step takes longer than this; 0: it never does."),
    ] = _STANDARD.watchdog_timeout_s or 0.0
    shutdown_timeout: Annotated[
        float,
        Option(
            metavar="SECONDS", help="Longest that running requests may go on after a signal to stop; 0: abort them."
        ),
    ] = _STANDARD.shutdown_timeout_s
    log_stats_interval: Annotated[
        float, Option(metavar="SECONDS", help="How often the log has a line on what the engine does; 0: never.")
    ] = _STANDARD.stats_interval_s or 0.0
    log_requests: Annotated[
        bool,
        Option("--log-requests", help="Log the prompts and settings of requests: without it no content is logged."),
    ] = False
    access_log: Annotated[bool, Option(help="Log a line for each HTTP request.")] = True
    enable_profiling: Annotated[
        bool, Option("--enable-profiling", help="Allow POST /start_profile and /stop_profile, to all who may ask.")
    ] = False

    def settings(self, *, local_host: str | None) -> ServerSettings:
        """Checked. local_host: the address, where only this machine can reach it. Raises TinyvllmError."""
        keys = gather_api_keys(self.api_key or [], self.api_key_file, os.environ.get(API_KEY_VARIABLE))
        hosts: tuple[str, ...] | None = None
        if self.allowed_hosts:
            hosts = None if "*" in self.allowed_hosts else (*self.allowed_hosts, *LOOPBACK_HOSTS)
        elif local_host is not None and not keys:
            hosts = (*LOOPBACK_HOSTS, local_host)
        return ServerSettings(
            enable_profiling=self.enable_profiling,
            max_num_queued_requests=self.max_num_queued_requests,
            max_num_queued_tokens=self.max_num_queued_tokens,
            max_body_bytes=self.max_body_bytes,
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
