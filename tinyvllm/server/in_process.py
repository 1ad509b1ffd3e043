"""Send requests to an ASGI app within the process, for work that comes from files instead of clients."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Scope


async def post(app: ASGIApp, path: str, body: bytes, request_id: str) -> tuple[int, bytes]:
    """POST JSON and return (status, body). Canceling it means that the client leaves."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"x-request-id", request_id.encode()),
        ],
        "client": None,
        "server": None,
    }
    is_sent = False
    status = 500
    parts: list[bytes] = []

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:  # after the body only http.disconnect could follow, and this client stays
            await asyncio.Event().wait()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)
