"""GET /v1/models for Anthropic's clients, which send the header anthropic-version. OpenAI's API has the same path."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import Match
from starlette.types import Scope

from tinyvllm.errors import RequestError
from tinyvllm.server.anthropic.protocol import ErrorAnswer
from tinyvllm.server.error_bodies import names_anthropic
from tinyvllm.server.intake import require_model
from tinyvllm.server.settings import APIS
from tinyvllm.server.shelf import ShelvedModel, find_model, shelf_of
from tinyvllm.server.state import state_of


class _VersionedRoute(APIRoute):
    """A route for requests with the header, or for all requests if OpenAI's API is off."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and not names_anthropic(scope) and "openai" in _apis(scope):
            return Match.NONE, {}
        return super().matches(scope)


def _apis(scope: Scope) -> Collection[str]:
    app = scope.get("app")
    return APIS if app is None else app.state.server.settings.apis


# not in the OpenAPI document, which allows one operation per path and method: OpenAI's
router = APIRouter(route_class=_VersionedRoute, include_in_schema=False, responses={"4XX": {"model": ErrorAnswer}})


class ModelInfo(BaseModel):
    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: datetime
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None  # prompt and answer together; None until the model has been loaded
    max_tokens: int | None


class ModelPage(BaseModel):
    data: list[ModelInfo]
    has_more: bool
    first_id: str | None
    last_id: str | None


@router.get("/v1/models")
async def list_models(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after_id: str | None = None,
    before_id: str | None = None,
) -> ModelPage:
    state_of(request).require_engine()
    models = [_info(model, name) for model in shelf_of(request).models() for name in model.names]
    ids = [model.id for model in models]
    if after_id is not None:
        models = models[_position(ids, after_id, "after_id") + 1 :]
        page = models[:limit]
    elif before_id is not None:
        models = models[: _position(ids, before_id, "before_id")]
        page = models[-limit:]
    else:
        page = models[:limit]
    return ModelPage(
        data=page,
        has_more=len(page) < len(models),
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
    )


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, request: Request) -> ModelInfo:
    state = state_of(request)
    require_model(state, model_id)
    state.require_engine()
    model = find_model(shelf_of(request).models(), model_id)
    assert model is not None, "the shelf has every name that require_model accepts"
    return _info(model, model_id)


def _position(ids: list[str], cursor: str, param: str) -> int:
    if cursor not in ids:
        raise RequestError(f"{param} is {cursor!a:.80}, which is not the id of a model", param=param)
    return ids.index(cursor)


def _info(model: ShelvedModel, name: str) -> ModelInfo:
    return ModelInfo(
        id=name,
        display_name=name,
        created_at=datetime.fromtimestamp(model.created, UTC),
        max_input_tokens=model.max_model_len,
        max_tokens=model.max_model_len,
    )
