"""Where the server listens: a TCP port or a file in the file system, plain or with TLS."""

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


@dataclass(frozen=True)
class TlsFiles:
    """A certificate, with the chain that clients need, and its key: PEM files."""

    certfile: str
    keyfile: str | None = None  # None: the key is in certfile too

    def check(self) -> None:
        """TinyvllmError if the pair cannot be used. Done before a model is loaded, as binding is."""
        for flag, file in (("--ssl-certfile", self.certfile), ("--ssl-keyfile", self.keyfile)):
            if file is not None and not Path(file).is_file():
                raise TinyvllmError(f"{flag} {file} is no file: name a PEM file")
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.certfile, self.keyfile)
        except (OSError, ssl.SSLError) as error:
            raise TinyvllmError(
                f"--ssl-certfile {self.certfile} and --ssl-keyfile {self.keyfile} are no pair that can be used: {error}"
            ) from error


def bind(host: str, port: int) -> socket.socket:
    """A socket on host:port (0: any free port). Done before a model is loaded, so that a port in use costs no wait."""
    if not 0 <= port < 2**16:  # the system would take the lower 16 bits without a word
        raise TinyvllmError(f"--port is {port}: give a number between 0 (any free port) and 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise TinyvllmError(f"--host {host} --port {port} is no address of this machine: {error}") from error
    sock = socket.socket(family, kind, proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)  # SO_REUSEADDR lets two bind; the second to listen is told
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            remedy = "stop the program that has it, or choose another with --port"
            raise TinyvllmError(f"port {port} of {host} is in use: {remedy}") from error
        raise TinyvllmError(f"cannot listen on --host {host} --port {port}: {error}") from error
    return sock


def bind_unix(path: str) -> socket.socket:
    """A socket in the file system, for the owner and the group. One that a dead server left behind is replaced."""
    if not hasattr(socket, "AF_UNIX"):
        raise TinyvllmError(f"--uds {path}: this system has no Unix sockets: use --host and --port")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead(path)
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


def _remove_dead(path: str) -> None:
    """Remove the socket at `path` if nobody listens on it. TinyvllmError if somebody does, or if it is no socket."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise TinyvllmError(f"--uds {path} exists and is no socket: name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise TinyvllmError(f"--uds {path} is in use: stop the program that has it, or name another path")


@contextlib.contextmanager
def closing(sock: socket.socket) -> Iterator[None]:
    """Close a listening socket in the end; its file goes too."""
    name = sock.getsockname()  # now: the server closes it first
    try:
        yield
    finally:
        sock.close()
        if isinstance(name, str):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def address_of(sock: socket.socket, *, has_tls: bool = False) -> str:
    """The URL that reaches `sock` from this machine; of a Unix socket its path."""
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host, port = name[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if has_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_public(sock: socket.socket) -> bool:
    """Whether other machines may reach it."""
    name = sock.getsockname()
    return not isinstance(name, str) and not name[0].startswith("127.") and name[0] != "::1"


def end_silent_peers(sock: socket.socket, idle_timeout_s: float | None) -> None:
    """Have the system close connections, accepted from now on, whose peer takes nothing for that long, where it can.

    Our own limit ends the request at once; this one ends the connection, whose last bytes nobody fetches.
    """
    if idle_timeout_s is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, int(1000 * idle_timeout_s))
