"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as in vLLM, if --allow-runtime-lora allows it."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse, Response

from tinyvllm.errors import RequestError
from tinyvllm.server.failures import UnknownModelError
from tinyvllm.server.intake import ERRORS
from tinyvllm.server.model_names import is_name_of
from tinyvllm.server.state import ServerState, state_of

MAX_NAME = 256  # characters

router = APIRouter(responses=ERRORS)


class LoadAdapterRequest(BaseModel):
    """The fields are vLLM's."""

    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: str = Field(min_length=1, max_length=MAX_NAME)
    lora_path: str = Field(min_length=1)  # a directory on the server's machine
    load_inplace: bool = False  # replace an adapter of this name


class UnloadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: str = Field(min_length=1, max_length=MAX_NAME)
    lora_int_id: int | None = None  # vLLM's; the name identifies the adapter


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadAdapterRequest, request: Request) -> Response:
    """Load an adapter into every engine; requests choose it by `model`. 403 unless the server allows it, 400 for an
    adapter that cannot be used, with the reason."""
    state = _require_allowed(request)
    state.require_engine()
    if is_name_of(body.lora_name, state.model_names):
        raise RequestError(f"lora_name {body.lora_name!a} is the model's own name: choose another", param="lora_name")
    await state.engine.load_adapter(body.lora_name, body.lora_path, replaces=body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadAdapterRequest, request: Request) -> Response:
    """Forget an adapter. Requests that use it are answered to their end. 404 if there is none of this name."""
    state = _require_allowed(request)
    state.require_engine()
    known = [info.name for info in state.engine.adapters()]
    if body.lora_name not in known:
        raise UnknownModelError(f"adapter {body.lora_name!a} is not loaded; loaded: {', '.join(known) or 'none'}")
    await state.engine.unload_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _require_allowed(request: Request) -> ServerState:
    state = state_of(request)
    if not state.settings.allow_runtime_lora:
        raise HTTPException(403, "loading adapters is off: start the server with --allow-runtime-lora")
    return state
