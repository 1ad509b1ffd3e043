"""What the generating routes share: checks of a request, ids of answers, and responses."""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from starlette.responses import Response

from tinyvllm.errors import ContextLengthError, RequestError
from tinyvllm.server.context import current
from tinyvllm.server.error_bodies import ErrorBody
from tinyvllm.server.events import Events
from tinyvllm.server.failures import UnknownModelError
from tinyvllm.server.generation import Job
from tinyvllm.server.measured_stream import make_writer
from tinyvllm.server.model_names import is_name_of
from tinyvllm.server.streaming import EventStream

if TYPE_CHECKING:
    from tinyvllm.server.openai.protocol.generation import GenerationRequest
    from tinyvllm.server.state import ServerState

# The error responses of OpenAI's routes, for the OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def openapi_event_stream(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entry of a route that answers `stream=true` with server-sent events of `model`."""
    # without a type: tools that validate answers hold it against an event, whose data is a string
    schema = {"description": f"Events of {model.__name__} as JSON, then [DONE]."}
    return {200: {"content": {"text/event-stream": {"schema": schema}}}}


@dataclass(frozen=True)
class Heading:
    """The fields that every chunk of an answer repeats."""

    id: str
    created: int
    model: str


def make_heading(state: ServerState, prefix: str) -> Heading:
    context = current()  # the answer's id contains the request's, and so does every line that the engine logs about it
    unique = context.request_id if context.is_own_id else f"{context.request_id}-{uuid.uuid4().hex[:8]}"
    return Heading(id=f"{prefix}{unique}", created=int(time.time()), model=answering_model(state))


def require_model(state: ServerState, name: str | None) -> None:
    """Choose what answers the request that is being handled: the served model, or an adapter of it.

    Raises UnknownModelError if `name` is given and names neither."""
    if name is not None and not chooses(state, name):
        raise does_not_exist(name, state.all_names)


def chooses(state: ServerState, name: str) -> bool:
    """Whether a name is the served model's, or that of an adapter, with which the request is then answered."""
    if is_name_of(name, state.model_names):
        return True
    current().adapter = state.find_adapter(name)
    return current().adapter is not None


def answering_model(state: ServerState) -> str:
    """The name of what answers the request that is being handled."""
    adapter = current().adapter
    return state.engine.served_model_name if adapter is None else adapter.name


def does_not_exist(name: object, known: Collection[str]) -> UnknownModelError:
    return UnknownModelError(f"the model {name!a:.200} does not exist: this server has {', '.join(map(repr, known))}")


def check_request(state: ServerState, body: GenerationRequest) -> None:
    """Raise the errors that can be found before the prompt is read."""
    state.require_ready()
    require_model(state, body.model)
    body.refuse_unsupported()


def check_ids(
    state: ServerState, ids: list[int], max_tokens: int | None, *, param: str, limit_param: str = "max_tokens"
) -> None:
    """Raise RequestError, naming the field, for a prompt that can never run. Called before anything is queued.

    With --clamp-max-tokens, `max_tokens` may be any: `ServerState.generate` shortens it.
    """
    vocab_size, limit = state.engine.model_config.vocab_size, state.context_limit
    if not ids:
        raise RequestError(f"{param} has no tokens: give at least one", param=param)
    if len(ids) >= limit:
        raise ContextLengthError(
            f"{param} has {len(ids)} tokens, but the maximum context length is {limit} tokens, of which one must be "
            "left for the output: shorten it, or start the server with a larger --max-model-len",
            param=param,
        )
    if max(ids) >= vocab_size:
        raise RequestError(
            f"{param} has the token id {max(ids)}, but the vocabulary has {vocab_size} tokens", param=param
        )
    if max_tokens is not None and len(ids) + max_tokens > limit and not state.settings.clamp_max_tokens:
        raise ContextLengthError(
            f"{len(ids)} tokens of {param} and {max_tokens} of output exceed the maximum context length of {limit} "
            f"tokens: shorten {param}, ask for fewer tokens, or start the server with a larger --max-model-len",
            param=limit_param,
        )


def json_response(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(by_alias=True), media_type="application/json")


async def event_stream(state: ServerState, job: Job, events: Events) -> EventStream:
    """Generate, and answer with events. Returns when the first output is there, so that refusals have their status."""
    writer = make_writer(events)
    generation = await state.generate(job, writer)
    try:
        await writer.wait_for_first()
    except BaseException:
        generation.close()
        raise
    return EventStream(writer, generation)
