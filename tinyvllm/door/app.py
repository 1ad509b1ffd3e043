"""The door's ASGI app: relays requests for a model to the model's own server, once it is loaded.

It has all routes of the single server, so that unknown paths and the OpenAPI document are the same. It answers those
that need no loaded model: lists of models (from the door's shelf), probes, metrics, and the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, quote

import msgspec
from fastapi import APIRouter, FastAPI, Query, Request
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tinyvllm import __version__
from tinyvllm.door.fields import BodyFields, read_fields
from tinyvllm.door.fleet import Child, Fleet
from tinyvllm.door.metrics import DoorMetrics
from tinyvllm.door.policy import State
from tinyvllm.errors import EngineDeadError
from tinyvllm.server.app import bare_app, guard
from tinyvllm.server.context import current
from tinyvllm.server.events import EVENT_STREAM, KEEPALIVE
from tinyvllm.server.failures import (
    ClientGone,
    DoesNotFitError,
    ModelGoneError,
    UnknownResponseError,
    failure_of,
)
from tinyvllm.server.front_ends import FrontEnds
from tinyvllm.server.intake import does_not_exist, json_response
from tinyvllm.server.live import EngineState
from tinyvllm.server.ollama.keep_alive import read_duration
from tinyvllm.server.ollama.model_details import rfc3339
from tinyvllm.server.ollama.wire import unknown_model
from tinyvllm.server.relay import PeerGoneError, RequestBody, fetch, relay
from tinyvllm.server.request_limits import Admission, Drain, DrainingError, timed_out
from tinyvllm.server.request_log import MAX_LISTED, RequestLog, merge
from tinyvllm.server.request_routes import json_answer, selection, unknown_request
from tinyvllm.server.routes import find_route, include_routes
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.streaming import until_disconnect

# Paths that the door answers itself; every other route is a model's.
OWN_PATHS = frozenset(
    (
        "/",
        "/health",
        "/ping",
        "/ready",
        "/version",
        "/metrics",
        "/engine/state",
        "/requests",
        "/requests/{request_id:path}",
        "/v1/models",
        "/v1/models/{model_id:path}",
        "/api/version",
        "/api/tags",
        "/api/ps",
        "/api/show",
        "/api/pull",
        "/api/delete",
        "/api/copy",
        "/api/create",
        "/api/push",
        "/api/blobs/{digest}",
    )
)
LOAD_ADAPTER_PATH, UNLOAD_ADAPTER_PATH = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
MAX_ADAPTERS = 4096  # whose models are remembered
RESPONSE_PATH = "/v1/responses/{response_id}"
# Routes whose streams are server-sent events, which comments can keep alive while a client waits.
SSE_PATHS = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"))
MAX_KEPT_CHARS = 64  # of a path whose route is kept
UNLOAD_PATHS = ("/api/generate", "/api/chat")  # without input they load or unload a model

router = APIRouter(include_in_schema=False)  # the single server's routes of these paths are in the OpenAPI document


class DoorState:
    """What the app's handlers share. Has what the listing routes and the envelope read of a ServerState."""

    def __init__(self, fleet: Fleet, settings: ServerSettings) -> None:
        self.fleet = fleet
        self.settings = settings
        self.front_ends = FrontEnds()
        self.admission = Admission(settings)
        self.drain = Drain()
        self.metrics = DoorMetrics(fleet, self.front_ends)
        self.requests = RequestLog(max_records=1)  # the models' servers keep those that they answer
        self.start_s = time.monotonic()
        self.adapters: dict[str, str] = {}  # models by the adapters that clients had them load

    @property
    def model_names(self) -> Sequence[str]:
        return [name for model in self.fleet.settings.models for name in (*model.names, *model.adapters)]

    @property
    def all_names(self) -> Sequence[str]:
        return [*self.model_names, *self.adapters]

    def require_engine(self) -> None:
        """Models can be listed at any time."""

    def find(self, name: object, path: str = "") -> str:
        """The name of the model that a request to `path` asks for; the first one if it names none. Raises
        UnknownModelError, worded as in the path's API."""
        models = self.fleet.settings.models
        if name is None:
            return models[0].name
        found = self.fleet.settings.find(name) if isinstance(name, str) else None
        if found is not None:
            return found.name
        if isinstance(name, str) and (model := self.adapters.get(name.removesuffix(":latest"))) is not None:
            return model
        if path.startswith("/api/"):
            raise unknown_model(name, self.all_names)
        raise does_not_exist(name, self.all_names)

    def note_adapter(self, path: str, name: str, model: str) -> None:
        """Remember which model has been asked to load or to forget an adapter: requests for it are that model's."""
        if path == LOAD_ADAPTER_PATH:
            self.adapters[name] = model
            while len(self.adapters) > MAX_ADAPTERS:
                del self.adapters[next(iter(self.adapters))]
        elif path == UNLOAD_ADAPTER_PATH:
            self.adapters.pop(name, None)

    def find_adapter(self, name: str) -> None:
        """None: a model's own server knows its adapters."""


def make_door_app(fleet: Fleet, settings: ServerSettings) -> FastAPI:
    """The app in front of the fleet, which the caller starts and closes."""
    app = bare_app()
    state = app.state.server = DoorState(fleet, settings)
    app.state.shelf = fleet
    app.include_router(router)  # first: these take the place of the single server's
    include_routes(app, settings.apis)
    app.add_middleware(Relays, state=state)
    guard(app, state)
    return app


# ---- Routes that the door answers itself ----


class DoorReadiness(BaseModel):
    """The state of every model."""

    models: dict[str, str]


def door_of(request: Request) -> DoorState:
    state: DoorState = request.app.state.server
    return state


@router.get("/health", response_class=Response)
@router.head("/health")
@router.get("/ping", response_class=Response)
@router.head("/ping")
@router.post("/ping", response_class=Response)
async def health() -> Response:
    """200 with an empty body while the door works, whatever the state of its models."""
    return Response()


@router.get("/ready")
@router.head("/ready")
async def ready(request: Request) -> DoorReadiness:
    """200 while new requests are accepted, whether or not a model is loaded; 503 from the first stop signal on."""
    state = door_of(request)
    _refuse_in_drain(state)
    return DoorReadiness(models={model.name: model.state for model in state.fleet.models() if model.parent is None})


@router.get("/metrics", response_class=Response)
@router.head("/metrics")
async def metrics(request: Request) -> Response:
    """The door's own metrics, and those of the loaded models with the label model_name."""
    text = await door_of(request).metrics.render()
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/engine/state")
async def live_state(request: Request, model: str | None = None) -> Response:
    """What a model's engine is doing. Asking neither loads a model nor keeps it loaded."""
    state = door_of(request)
    name = state.find(model)
    child = state.fleet.loaded().get(name)
    if child is not None:
        try:
            return Response(await fetch(child.uds, "/engine/state"), media_type="application/json")
        except PeerGoneError as error:
            raise EngineDeadError(f"the model {name!r} does not answer: {error}") from error
    shown = next(shelved.state for shelved in state.fleet.models() if shelved.name == name)
    return json_response(
        EngineState(
            status="draining" if state.drain.has_begun else "loading" if shown == "loading" else "unloaded",
            model=name,
            version=__version__,
            uptime_s=time.monotonic() - state.start_s,
            can_chat=state.fleet.facts[name].can_chat,
        )
    )


@router.get("/requests")
async def list_requests(
    request: Request,
    last: int | None = Query(None, ge=1, le=MAX_LISTED),
    slowest: int | None = Query(None, ge=1, le=MAX_LISTED),
) -> Response:
    """The latest or slowest requests of all loaded models."""
    num, is_slowest = selection(last, slowest)
    path = f"/requests?{'slowest' if is_slowest else 'last'}={num}"
    answers = await _fetch_all(door_of(request), path)
    return json_answer({"requests": merge((one["requests"] for one in answers), num, slowest=is_slowest)})


@router.get("/requests/{request_id:path}")
async def get_request(request: Request, request_id: str) -> Response:
    """Where the time of one request went, from the loaded model that answered it."""
    for answer in await _fetch_all(door_of(request), f"/requests/{quote(request_id, safe='')}"):
        return json_answer(answer)
    raise unknown_request(request_id)


async def _fetch_all(state: DoorState, path: str) -> list[Any]:
    """What the loaded models' servers answer, without those that do not know."""
    answers = []
    for child in state.fleet.loaded().values():
        with contextlib.suppress(PeerGoneError):
            answers.append(msgspec.json.decode(await fetch(child.uds, path)))
    return answers


def _refuse_in_drain(state: DoorState) -> None:
    if state.drain.has_begun:
        raise DrainingError("the server is stopping and takes no new requests: use another, or try again later")


# ---- Requests that are relayed ----


class Relays:
    """Middleware that relays requests for a model. It is innermost, so that the checks of the others apply."""

    def __init__(self, app: ASGIApp, state: DoorState) -> None:
        self._app = app
        self._state = state
        self._find_fixed = functools.lru_cache(maxsize=256)(self._find_by_path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._route_of(scope) if scope["type"] == "http" else None
        if route is None or route.path in OWN_PATHS:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # requests are counted by it
        try:
            await _Exchange(self._state, scope, receive, send, route.path).run()
        except (ClientGone, OSError):  # OSError: the client does not read
            return

    def _route_of(self, scope: Scope) -> Route | None:
        """The route that the request will take. Looking it up takes 20 us, so those of common paths are cached."""
        find = self._find_fixed if len(scope["path"]) <= MAX_KEPT_CHARS else self._find_by_path
        return find(scope["method"], scope["path"])

    def _find_by_path(self, method: str, path: str) -> Route | None:
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
        route = find_route(scope, self._state.settings.apis)
        return route if isinstance(route, Route) else None


class _Exchange:
    """One request for a model, and its answer."""

    def __init__(self, state: DoorState, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        self._state = state
        self._fleet = state.fleet
        self._scope = scope
        self._receive = receive
        self._send = send
        self._path = path  # with its placeholders
        self._has_started = False
        settings = state.settings
        start_s = asyncio.get_running_loop().time()
        # for requests that have to wait; the model's own server limits the others
        self._deadline_s = None if settings.request_timeout_s is None else start_s + settings.request_timeout_s
        self._load_until_s = start_s + self._fleet.settings.load_timeout_s

    async def run(self) -> None:
        if self._scope["method"] not in ("GET", "HEAD"):
            _refuse_in_drain(self._state)
        body = await self._read()
        fields = await read_fields(body)
        if self._path.startswith(RESPONSE_PATH):
            child = await until_disconnect(self._receive, self._child_with(self._scope["path"].split("/")[3]))
            if child is None:
                raise self._unknown_response()
            await until_disconnect(self._receive, self._relay(child, body))
            return
        name = self._named_model(fields)
        if name is None and isinstance(fields.previous_response_id, str):
            maker = await until_disconnect(self._receive, self._child_with(fields.previous_response_id))
            name = None if maker is None else maker.process.name
        adapter = fields.lora_name if isinstance(fields.lora_name, str) else None
        if name is None and adapter is not None and self._path == UNLOAD_ADAPTER_PATH:
            name = adapter
        model = self._state.find(name, self._path)
        if adapter is not None:
            self._state.note_adapter(self._path, adapter, model)
        if self._only_unloads(fields) and self._fleet.state_of(model) is State.UNLOADED:
            await self._answer_unloaded(fields)
            return
        await until_disconnect(self._receive, self._serve(model, fields, body))

    async def _read(self) -> bytes:
        parts, more = [], True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        return b"".join(parts)

    def _named_model(self, fields: BodyFields) -> object:
        if fields.model is not None:
            return fields.model
        return next(iter(parse_qs(self._scope["query_string"].decode("latin-1")).get("model", [])), None)

    def _only_unloads(self, fields: BodyFields) -> bool:
        return self._path in UNLOAD_PATHS and not fields.has_input and _keep_alive_of(self._path, fields) == 0

    async def _answer_unloaded(self, fields: BodyFields) -> None:
        """Ollama's answer to a request to unload a model that is not loaded."""
        answer: dict[str, Any] = {"model": fields.model, "created_at": rfc3339(time.time()), "done": True}
        answer["done_reason"] = "unload"
        answer |= (
            {"response": ""} if self._path == UNLOAD_PATHS[0] else {"message": {"role": "assistant", "content": ""}}
        )
        await _json(answer)(self._scope, self._receive, self._send)

    async def _child_with(self, response_id: str) -> Child | None:
        """The loaded model whose server has stored this response."""
        for child in self._fleet.loaded().values():
            with contextlib.suppress(PeerGoneError):
                await fetch(child.uds, f"/v1/responses/{quote(response_id, safe='')}")
                return child
        return None

    def _unknown_response(self) -> UnknownResponseError:
        response_id = ascii(self._scope["path"].split("/")[3])[:80]
        return UnknownResponseError(
            f"the response {response_id} is not stored: a model's responses are kept while it is loaded. Send the "
            "whole conversation as input",
            "response_id",
        )

    async def _serve(self, model: str, fields: BodyFields, body: bytes) -> None:
        """Wait for the model, and relay the request to it."""
        waiting = self._fleet.enter(model, _keep_alive_of(self._path, fields))
        try:
            async with asyncio.timeout_at(None if waiting.admitted.done() else self._deadline_s):
                await self._wait(model, waiting.admitted, has_stream=fields.stream is True)
                await self._relay(waiting.admitted.result(), body)
        except TimeoutError:
            await self._fail(timed_out(self._state.settings.request_timeout_s or 0.0))
        except (ClientGone, OSError):
            raise
        except Exception as error:
            await self._fail(error)
        finally:
            self._fleet.leave(waiting)

    async def _wait(self, model: str, admitted: asyncio.Future[Child], *, has_stream: bool) -> None:
        """Wait until the request is admitted. A stream is kept alive only after a silent interval, because its status
        can still change until then. Raises what the model's load raised."""
        loop, keepalive_s = asyncio.get_running_loop(), self._state.settings.keepalive_s
        is_kept_alive = has_stream and self._path in SSE_PATHS and keepalive_s is not None
        while not admitted.done():
            left_s = self._load_until_s - loop.time()
            if left_s <= 0:
                raise DoesNotFitError(self._fleet.why_waiting(model))
            pause_s = min(left_s, keepalive_s) if is_kept_alive and keepalive_s is not None else left_s
            await asyncio.wait((admitted,), timeout=pause_s)
            if not admitted.done() and is_kept_alive:
                await self._keep_alive()
        admitted.result()

    async def _keep_alive(self) -> None:
        if not self._has_started:
            self._has_started = True
            headers = [(b"content-type", f"{EVENT_STREAM}; charset=utf-8".encode()), (b"cache-control", b"no-cache")]
            headers.append((b"x-accel-buffering", b"no"))
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": KEEPALIVE, "more_body": True})

    async def _relay(self, child: Child, body: bytes) -> None:
        name = child.process.name
        current().is_counted_elsewhere = True
        await relay(
            child.uds,
            self._scope,
            RequestBody.of(body, self._receive),
            self._send,
            lambda reason: ModelGoneError(f"the process of the model {name!r} has ended: try again"),
            has_started=self._has_started,
            on_start=self._note_start,
        )

    def _note_start(self) -> None:
        self._has_started = True

    async def _fail(self, error: BaseException) -> None:
        """Answer with an error, as an event if a stream has begun. Raises it if nothing has been sent."""
        current().is_counted_elsewhere = False
        if not self._has_started:
            raise error
        event = failure_of(error).event(self._path)
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _keep_alive_of(path: str, fields: BodyFields) -> float | None:
    """Seconds for which the request wants its model to stay loaded. Invalid values are left to the route."""
    if not path.startswith("/api/"):
        return None
    try:
        seconds = read_duration(fields.keep_alive)
    except ValueError:
        return None
    return seconds if isinstance(seconds, float) else None


def _json(answer: Mapping[str, Any]) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
