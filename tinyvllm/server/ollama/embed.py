"""POST /api/embed, and /api/embeddings, which it replaces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tinyvllm.errors import RequestError
from tinyvllm.profiling import measure
from tinyvllm.server.intake import check_ids, json_response, make_heading
from tinyvllm.server.ollama.keep_alive import KeepAlive
from tinyvllm.server.ollama.options import Options, read_options
from tinyvllm.server.ollama.prompts import context_of
from tinyvllm.server.ollama.protocol import Request
from tinyvllm.server.ollama.wire import make_router, require_model
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import until_disconnect
from tinyvllm.server.workers import on_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_INPUTS = 2048

router = make_router()


def _check_input(value: object) -> object:
    """One text or several, as a list. A single empty text, or null, gives an empty list."""
    if value is None or isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    raise ValueError("give a string or a list of strings")


class EmbedRequest(Request):
    """POST /api/embed."""

    input: Annotated[
        list[str],
        BeforeValidator(_check_input, json_schema_input_type=str | list[str] | None),
        Field(max_length=MAX_INPUTS, default_factory=list),
    ]
    truncate: bool | None = None
    dimensions: Annotated[int | None, Field(ge=0)] = None
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None


class EmbeddingsRequest(Request):
    """POST /api/embeddings."""

    prompt: str | None = None
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None


class EmbedAnswer(BaseModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class EmbeddingsAnswer(BaseModel):
    embedding: list[float]


@router.post("/api/embed", response_model=EmbedAnswer)
async def embed(body: EmbedRequest, request: HttpRequest) -> Response:
    """A unit vector for each text, pooled as the model's files say, or else the mean of its states."""
    return await until_disconnect(request.receive, _embed(state_of(request), body))


@router.post("/api/embeddings", response_model=EmbeddingsAnswer)
async def embeddings(body: EmbeddingsRequest, request: HttpRequest) -> Response:
    """The vector of one text."""
    return await until_disconnect(request.receive, _embed_one(state_of(request), body))


async def _embed(state: ServerState, body: EmbedRequest) -> Response:
    arrival_s = time.perf_counter()
    texts = await _read(state, body, body.input, is_truncated=body.truncate is not False)
    read_s = time.perf_counter()
    vectors = await _vectors(state, texts, arrival_s)
    answer = EmbedAnswer(
        model=body.model,
        embeddings=[_shortened(vector, body.dimensions) for vector in vectors],
        total_duration=round((time.perf_counter() - arrival_s) * 1e9),
        load_duration=round((read_s - arrival_s) * 1e9),
        prompt_eval_count=sum(map(len, texts)),
    )
    return json_response(answer)


async def _embed_one(state: ServerState, body: EmbeddingsRequest) -> Response:
    arrival_s = time.perf_counter()
    texts = await _read(state, body, [body.prompt] if body.prompt else [], is_truncated=True)
    vectors = await _vectors(state, texts, arrival_s)
    return json_response(EmbeddingsAnswer(embedding=vectors[0].tolist() if vectors else []))


async def _read(
    state: ServerState, body: EmbedRequest | EmbeddingsRequest, texts: list[str], *, is_truncated: bool
) -> list[list[int]]:
    """Each text's ids, after checking the request."""
    state.require_ready()
    require_model(state, body.model)
    body.log_unknown()
    options = read_options(body.options)
    return await on_thread(_encode, state, texts, options, is_truncated)


def _encode(state: ServerState, texts: list[str], options: Options, is_truncated: bool) -> list[list[int]]:
    tokenizer, room = state.engine.tokenizer, context_of(state, options) - 1
    encoded = []

    def check_length(num_tokens: int) -> None:
        if num_tokens > room and not is_truncated:
            raise RequestError(
                f"the input length exceeds the context length: a text has {num_tokens} tokens, but at most {room} fit",
                param="input",
            )

    for text in texts:
        check_length(tokenizer.least_tokens(text))  # before it is encoded, which may take seconds
        with measure.span(measure.TOKENIZE):
            ids = tokenizer.encode(tokenizer.without_middle(text, room) if is_truncated else text)
        check_length(len(ids))
        ids = tokenizer.cut(ids, room, keeps_end=False, has_special_tokens=True) if is_truncated else ids
        check_ids(state, ids, None, param="input")
        encoded.append(ids)
    return encoded


async def _vectors(state: ServerState, texts: list[list[int]], arrival_s: float) -> Sequence[NDArray[np.float32]]:
    heading = make_heading(state, "embd-")
    pooling = state.engine.model_config.pooling or "mean"
    tasks = [
        asyncio.ensure_future(state.embed(ids, pooling, request_id=f"{heading.id}-{index}", arrival_s=arrival_s))
        for index, ids in enumerate(texts)
    ]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # if one fails or the client leaves, the others stop
            task.cancel()


def _shortened(vector: NDArray[np.float32], dimensions: int | None) -> list[float]:
    """The first numbers, normalized to length 1; all of them if `dimensions` is 0, null or not smaller."""
    if dimensions and dimensions < len(vector):
        vector = vector[:dimensions]
        vector = (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)
    numbers: list[float] = vector.tolist()
    return numbers
