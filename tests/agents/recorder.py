"""ASGI middleware that keeps what a client sent, and the status and text of what it got."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Headers that say which protocol a client speaks. The others name the machine, the user, or a key.
KEPT_HEADERS = (
    "accept",
    "anthropic-beta",
    "anthropic-version",
    "content-encoding",
    "content-type",
    "openai-beta",
    "originator",
    "user-agent",
)


@dataclass
class Request:
    method: str
    path: str  # with the query
    headers: dict[str, str]  # those of KEPT_HEADERS
    body: Any  # parsed JSON; None if there is none, and the text if it is not JSON
    status: int = 0  # 0 until the response starts
    answer: str = field(default="", repr=False)  # the response's body

    def sent(self) -> dict[str, Any]:
        """The request without the response, for a file of recorded requests."""
        return {name: value for name, value in asdict(self).items() if name not in ("status", "answer")}


class Recorder:
    """Around an app: `requests` has every HTTP request in the order of arrival."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.requests: list[Request] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        answer = bytearray()
        request = _start(scope)
        self.requests.append(request)

        async def receive_and_keep() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    request.body = _parse(bytes(body), request.headers.get("content-encoding"))
            return message

        async def send_and_keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
            elif message["type"] == "http.response.body":
                answer.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    request.answer = answer.decode(errors="replace")
            await send(message)

        await self._app(scope, receive_and_keep, send_and_keep)

    def save(self, path: Path) -> None:
        """Write all requests as they came, with their answers."""
        path.write_text(json.dumps([asdict(request) for request in self.requests], indent=1), encoding="utf-8")


def _start(scope: Scope) -> Request:
    query = scope["query_string"].decode()
    headers = Headers(scope=scope)
    return Request(
        method=scope["method"],
        path=unquote(scope["path"]) + (f"?{query}" if query else ""),
        headers={name: headers[name] for name in KEPT_HEADERS if name in headers},
        body=None,
    )


def _parse(body: bytes, encoding: str | None) -> Any:
    if encoding == "gzip":
        body = gzip.decompress(body)
    if not body:
        return None
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
