"""Replicas on a Ray cluster, as an application of Ray Serve (`pip install "tinyvllm[ray]"`):

serve run tinyvllm.ray_app:build model=smollm2-135m-instruct min_replicas=2 max_replicas=8

`Replica` runs an engine and the HTTP app around it, in a Ray actor's process. `Door` takes HTTP requests and passes
them on through a handle, whose request router follows `engine/routing.py`. A request whose replica dies is run again on
another, and what the client has received is left out of the second answer. docs/SCALING.md says when to use it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tinyvllm.config import EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.routing import Route, Router, short_hashes
from tinyvllm.scheduling.block_hashes import hash_blocks, make_hash_seed
from tinyvllm.server.app import make_app
from tinyvllm.server.resume import ResumeError, Resumption
from tinyvllm.server.settings import ServerSettings

log = logging.getLogger(__name__)

TEXT_BLOCK = 64  # bytes of a prompt's text that count as one block of BLOCK_SIZE tokens: the door has no tokenizer
BLOCK_SIZE = 16
MAX_RUNS = 4  # of one request, on one replica after another
SEEDED_PATHS = ("/v1/chat/completions", "/v1/completions")


class Options(BaseModel):
    """The application's arguments."""

    model: str
    min_replicas: int = 1
    max_replicas: int = 8
    target_ongoing_requests: float = 16  # requests of a replica above which another is started
    num_doors: int = 1
    num_cpus: float = 1  # of each replica
    num_gpus: float = 0
    max_num_seqs: int = 64
    num_blocks: int = 8192  # of a replica's KV cache that the door remembers
    drain_s: float = 60  # how long a replica that is replaced may take to end its requests
    engine: dict[str, Any] = {}  # further fields of EngineConfig
    api_keys: list[str] = []


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application, for `serve run` and `serve deploy`. arguments: the fields of Options, also as text."""
    options = Options.model_validate(arguments)
    replica = serve.deployment(
        health_check_period_s=2,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target_ongoing_requests,
        ),
        max_ongoing_requests=4 * options.max_num_seqs,
        graceful_shutdown_timeout_s=options.drain_s,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"max_num_seqs": options.max_num_seqs, "num_blocks": options.num_blocks},
        ),
    )(Replica).bind(options.model, {"max_num_seqs": options.max_num_seqs, **options.engine}, tuple(options.api_keys))
    return serve.deployment(num_replicas=options.num_doors, max_ongoing_requests=4096)(Door).bind(replica)


class Replica:
    """An engine with its HTTP app. Serve sends requests as soon as `__init__` has returned."""

    async def __init__(  # type: ignore[misc]
        self, model: str, engine: dict[str, Any], api_keys: tuple[str, ...]
    ) -> None:
        self.engine = AsyncEngine.start(EngineConfig(model, **engine))
        self.app = make_app(self.engine, ServerSettings(api_keys=api_keys))
        await self.engine.wait_ready()

    async def check_health(self) -> None:
        """Raises if /health fails, because the engine has died or a step does not end. Serve replaces the replica."""
        names = {"scheme": "http", "path": "/health", "raw_path": b"/health", "query_string": b"", "root_path": ""}
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "client": None, "server": None, **names}
        parts = [part async for part in self.handle({**scope, "headers": []}, b"", ())]
        if parts[0][0] != 200:
            raise RuntimeError(f"the replica is not healthy: {b''.join(parts[1:]).decode()}")

    async def handle(self, scope: dict[str, Any], body: bytes, hashes: Sequence[int]) -> AsyncIterator[Any]:
        """The answer to an HTTP request: (status, headers), then the body's parts. `hashes` are for the router."""
        messages: asyncio.Queue[Any] = asyncio.Queue()
        requests = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not requests:
                await asyncio.Event().wait()  # until the task is canceled
            return requests.pop()

        task = asyncio.create_task(self.app(scope, receive, messages.put))
        task.add_done_callback(lambda done: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], message["headers"]
                elif message.get("body"):
                    yield message["body"]
            task.result()
        finally:
            task.cancel()  # the client has left, or the answer is complete


class Door:
    """Receives HTTP requests, chooses replicas by prefix and load, and passes answers on as they come."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._handle = replicas.options(stream=True).handle

    async def __call__(self, request: Request) -> Response:
        body, hashes = prepare(request.url.path, await request.body())
        parts = self._answer(scope_of(request, len(body)), body, hashes)
        try:
            status, headers = await anext(parts)
        except RayError as error:
            return JSONResponse({"error": error_of(error)}, 503, {"retry-after": "1"})
        response = StreamingResponse(parts, status)
        own = (b"content-length", b"x-request-id")  # Serve sets them
        response.raw_headers = [(name, value) for name, value in headers if name not in own]
        return response

    async def _answer(self, scope: dict[str, Any], body: bytes, hashes: list[int]) -> AsyncIterator[Any]:
        """(status, headers) and the parts of the answer. If a replica dies, another computes the request again."""
        start: Any = None  # status and headers, once they are sent
        sent = bytearray()
        for run in range(1, MAX_RUNS + 1):
            parts = self._handle.remote(scope, body, hashes)
            resumption = Resumption(bytes(sent)) if sent else None
            try:
                async for part in parts:
                    if isinstance(part, tuple):
                        if start is None:
                            start = part
                            yield part
                        continue
                    news = part if resumption is None else resumption.cut(part)
                    sent += news
                    if news:
                        yield news
                return
            except ResumeError as error:
                yield b"data: " + json.dumps({"error": error_of(error)}).encode() + b"\n\n"
                return
            except RayError as error:
                if run == MAX_RUNS:
                    raise
                log.warning("%s after %d bytes, run %d: %s", scope["path"], len(sent), run, type(error).__name__)
            finally:
                parts.cancel()


def error_of(error: Exception) -> dict[str, str]:
    return {"message": f"the replica that answered has died: {error}", "type": "server_error"}


def prepare(path: str, body: bytes) -> tuple[bytes, list[int]]:
    """The body to send, and hashes of the prompt's text, which differ between models: the name may be an adapter's.
    Sampling without a seed gets one: it can then be repeated."""
    try:
        fields = json.loads(body)
        text = json.dumps([fields.get("tools"), fields.get("messages") or fields.get("input") or fields.get("prompt")])
        model = fields.get("model")
        seed = make_hash_seed(fields.get("cache_salt"), model if isinstance(model, str) else "")
    except (ValueError, AttributeError):  # a route without a prompt; or the replica refuses it
        return body, []
    if path in SEEDED_PATHS and fields.get("seed") is None:
        body = json.dumps({**fields, "seed": random.getrandbits(31)}).encode()
    return body, short_hashes(hash_blocks(list(text.encode()), TEXT_BLOCK, seed))


def scope_of(request: Request, num_bytes: int) -> dict[str, Any]:
    """The request as ASGI describes it, with an id that all runs share, so that their answers are the same."""
    names = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "client", "server")
    scope = {name: request.scope[name] for name in names if name in request.scope}
    headers = {**dict(request.scope["headers"]), b"content-length": b"%d" % num_bytes}
    headers.setdefault(b"x-request-id", b"%032x" % random.getrandbits(128))
    return {**scope, "root_path": "", "headers": list(headers.items())}


class PrefixRouter(RequestRouter):
    """Ray Serve's request router by the rule of engine/routing.py, with the requests of its own handle as knowledge.

    Engines do not tell it their blocks; it takes the `num_blocks` newest of each replica's as cached, without those of
    answers.
    """

    def initialize_state(self, max_num_seqs: int, num_blocks: int) -> None:
        self._rule = Router(BLOCK_SIZE)
        self._max_num_seqs, self._num_blocks = max_num_seqs, num_blocks
        self._routes: dict[str, tuple[Route, list[int]]] = {}  # by internal request id
        self._newest: dict[ReplicaID, OrderedDict[int, None]] = {}  # hashes, the oldest first

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        names = {replica.replica_id for replica in replicas}
        for name in set(self._newest) - names:
            self._forget(name)
        for name in sorted(names - set(self._newest), key=str):
            self._rule.add(name, self._max_num_seqs)
            self._newest[name] = OrderedDict()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._forget(replica_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica that the rule chooses; then all, the idlest first, should it refuse."""
        if not candidate_replicas or not self._newest:
            return []
        by_name = {replica.replica_id: replica for replica in candidate_replicas}
        hashes = hashes_of(pending_request)
        name, _ = self._rule.choose(hashes, num_tokens_of(hashes))
        known = [other for other in by_name if other in self._newest]
        others = [[by_name[other]] for other in sorted(known, key=self._rule.load)]
        return [[by_name[name]], *others] if name in by_name else others or [candidate_replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        if replica_id in self._newest:
            hashes = hashes_of(pending_request)
            route = self._rule.started(replica_id, hashes, num_tokens_of(hashes))
            self._routes[pending_request.metadata.internal_request_id] = route, hashes

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        route, hashes = self._routes.pop(internal_request_id, (None, []))
        if route is None:
            return
        newest = self._newest.get(replica_id)
        if route.is_open and newest is not None:
            self._rule.stored(replica_id, hashes)
            for block_hash in reversed(hashes):  # the head of a prefix is dropped last, as in a pool
                newest[block_hash] = None
                newest.move_to_end(block_hash)
            gone = [newest.popitem(last=False)[0] for _ in range(len(newest) - self._num_blocks)]
            self._rule.removed(replica_id, gone)
        self._rule.finished(route)

    def _forget(self, name: ReplicaID) -> None:
        if self._newest.pop(name, None) is not None:
            self._rule.remove(name)


def hashes_of(pending_request: PendingRequest | None) -> list[int]:
    """The last argument of `Replica.handle`."""
    return list(pending_request.args[2]) if pending_request is not None and len(pending_request.args) > 2 else []


def num_tokens_of(hashes: Sequence[int]) -> int:
    """An estimate of the prompt's tokens: those of its full blocks, and one."""
    return BLOCK_SIZE * len(hashes) + 1
