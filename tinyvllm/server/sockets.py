"""Listening sockets, TCP or Unix, and the files of TLS."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyvllm.errors import TinyvllmError

_BACKLOG = 2048
MAX_TIMEOUT_MS = 2**31 - 1  # of TCP_USER_TIMEOUT


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: a certificate with its chain, and the private key."""

    certfile: str
    keyfile: str | None = None  # None: certfile contains the key

    def check(self) -> None:
        """Raise TinyvllmError if the pair cannot be used. Called before the model is loaded, like `bind`."""
        for flag, file in (("--ssl-certfile", self.certfile), ("--ssl-keyfile", self.keyfile)):
            if file is not None and not Path(file).is_file():
                raise TinyvllmError(f"{flag} {file} is not a file: give a PEM file")
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.certfile, self.keyfile)
        except (OSError, ssl.SSLError) as error:
            raise TinyvllmError(
                f"--ssl-certfile {self.certfile} and --ssl-keyfile {self.keyfile} cannot be used together: {error}"
            ) from error


def bind(host: str, port: int) -> socket.socket:
    """A socket on host:port (0: any free port). Called before the model is loaded, so that it fails early."""
    if not 0 <= port < 2**16:  # the system would silently use the lower 16 bits
        raise TinyvllmError(f"--port is {port}: give a number between 0 (any free port) and 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise TinyvllmError(f"--host {host} --port {port} is not an address of this machine: {error}") from error
    sock = socket.socket(family, kind, proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)  # SO_REUSEADDR lets two sockets bind; the second to listen fails
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            remedy = "stop the program that uses it, or choose another with --port"
            raise TinyvllmError(f"port {port} of {host} is in use: {remedy}") from error
        raise TinyvllmError(f"cannot listen on --host {host} --port {port}: {error}") from error
    return sock


def bind_unix(path: str) -> socket.socket:
    """A Unix socket for owner and group. Replaces a stale one, which a dead server left behind."""
    if not hasattr(socket, "AF_UNIX"):
        raise TinyvllmError(f"--uds {path}: this system has no Unix sockets: use --host and --port")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        os.chmod(path, 0o660)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise TinyvllmError(f"cannot listen on --uds {path}: {error}") from error
    except TinyvllmError:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Remove the socket at `path`. Raises TinyvllmError if a server listens on it, or if it is not a socket."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise TinyvllmError(f"--uds {path} exists and is not a socket: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise TinyvllmError(f"--uds {path} is in use: stop the program that uses it, or choose another path")


@contextlib.contextmanager
def closing(sock: socket.socket) -> Iterator[None]:
    """Close a listening socket at the end, and remove the file of a Unix socket."""
    name = sock.getsockname()  # read now, because the server closes the socket first
    try:
        yield
    finally:
        sock.close()
        if isinstance(name, str):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def address_of(sock: socket.socket, *, has_tls: bool = False) -> str:
    """The URL of `sock` on this machine; unix:PATH for a Unix socket."""
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host, port = name[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if has_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_public(sock: socket.socket) -> bool:
    """Whether other machines may be able to reach `sock`."""
    name = sock.getsockname()
    return not isinstance(name, str) and not name[0].startswith("127.") and name[0] != "::1"


def end_silent_peers(sock: socket.socket, idle_timeout_s: float | None) -> None:
    """Have the kernel close accepted connections whose peer acknowledges nothing for `idle_timeout_s`. Linux only.

    The server's own limit ends the request; this one ends the connection when its last bytes are never fetched.
    """
    if idle_timeout_s is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, min(int(1000 * idle_timeout_s), MAX_TIMEOUT_MS))
