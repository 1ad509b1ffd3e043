"""Access control: API keys, and the names that the server answers to."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tinyvllm.server.error_bodies import path_of
from tinyvllm.server.failures import INVALID_REQUEST, Failure

# What orchestrators, scrapers and browsers request without a key. None of it shows the content of requests.
OPEN_PATHS = frozenset(("/", "/health", "/ready", "/ping", "/version", "/metrics", "/favicon.ico"))
OPEN_PREFIX = "/static/"

_PORT = re.compile(r":\d+$")


class KeyRing:
    """Holds the keys as hashes, so that every comparison takes the same time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def holds(self, key: str) -> bool:
        given, is_known = _digest(key), False
        for digest in self._digests:  # all of them: the time must not reveal which one matched
            is_known |= hmac.compare_digest(given, digest)
        return is_known


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", errors="replace")).digest()


class KeyCheck:
    """Middleware that answers 401 to requests without a known key."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or needs_no_key(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        key = _key_of(Headers(scope=scope))
        if key is not None and self._keys.holds(key):
            await self._app(scope, receive, send)
            return
        # read the body to its end: a client that is still writing would not see the answer
        while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
            pass
        remedy = "send a key that this server knows, as Authorization: Bearer KEY or as x-api-key: KEY"
        failure = Failure(
            401,
            f"the API key is {'missing' if not key else 'not known'}: {remedy}",
            INVALID_REQUEST,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await failure.response(path_of(scope))(scope, receive, send)


def _key_of(headers: Headers) -> str | None:
    """From OpenAI's header, or from Anthropic's."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


class FramingCheck:
    """Middleware against request smuggling: refuses requests whose end or host a proxy in front of this server may
    interpret differently, and closes their connections (RFC 9112, sections 3.2, 6.1 and 11.2). The HTTP parsers refuse
    most of them, and differ in the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure = None if scope["type"] != "http" else _ambiguity(Headers(scope=scope), scope["http_version"])
        if failure is None:
            await self._app(scope, receive, send)
        else:
            await failure.response(path_of(scope))(scope, receive, send)


def _ambiguity(headers: Headers, version: str) -> Failure | None:
    close = {"connection": "close"}
    codings = headers.getlist("transfer-encoding")
    if codings and "content-length" in headers:
        message = "the request has both Content-Length and Transfer-Encoding: send one of them"
        return Failure(400, message, INVALID_REQUEST, headers=close)
    if codings and [coding.strip().lower() for coding in codings] != ["chunked"]:
        message = "the request's Transfer-Encoding is not chunked: no other is supported"
        return Failure(501, message, INVALID_REQUEST, headers=close)
    if len(headers.getlist("host")) != 1 and version == "1.1":
        return Failure(400, "the request must have exactly one Host header", INVALID_REQUEST, headers=close)
    return None


class HostCheck:
    """Middleware that answers 403 to requests for a host name that is not the server's.

    A page can make its own host name resolve to this machine after it has loaded (DNS rebinding). To the browser the
    server then has the page's origin, and only the Host header gives it away.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            if _PORT.sub("", host).lower() not in self._hosts:
                message = f"the server is not called {host[:100]!a}: allow that name with --allowed-hosts"
                failure = Failure(403, message, INVALID_REQUEST, code="host_not_allowed")
                await failure.response(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def needs_no_key(method: str, path: str) -> bool:
    """Whether the request needs no key: it shows no content, or is a browser's CORS preflight."""
    if path == "/ping":  # POST too
        return True
    return method == "OPTIONS" or (method in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_PREFIX)))
