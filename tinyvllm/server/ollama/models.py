"""GET /api/tags, /api/ps and /api/version, POST /api/show: the models that this server has.

These routes read only the shelf, so that they answer while a model is still loading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from tinyvllm.errors import RequestError
from tinyvllm.server.ollama.model_details import Description, Details, Tensor, describe, rfc3339
from tinyvllm.server.ollama.wire import API_VERSION, make_router, tagged, unknown_model
from tinyvllm.server.openai.protocol.common import optional
from tinyvllm.server.shelf import ShelvedModel, all_names, find_model, shelf_of

NEVER_S = 10_982_044_800  # until the year 2318: Ollama's value for a model that stays loaded
COPILOT = "GitHubCopilotChat/"  # names models by `general.basename`; Ollama gives it the name that requests use
UNKNOWN_DIGEST = "0" * 64  # of a model whose files are not on this machine

router = make_router()


class Version(BaseModel):
    version: str


class ListedModel(BaseModel):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details
    capabilities: list[str]


class ModelList(BaseModel):
    models: list[ListedModel]


class RunningModel(BaseModel):
    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class RunningList(BaseModel):
    models: list[RunningModel]


class NamedRequest(BaseModel):
    """A request about one model. Older clients call it `name`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    name: str | None = None

    @property
    def model_name(self) -> str:
        name = self.model or self.name
        if not name:
            raise RequestError("model is required: give a model's name", param="model")
        return name


class ShowRequest(NamedRequest):
    """POST /api/show."""

    verbose: bool | None = None
    system: str | None = None


class ModelDescription(BaseModel):
    modelfile: str
    parameters: str
    template: str
    system: str | None = optional()
    details: Details
    model_info: dict[str, Any]
    tensors: list[Tensor] | None = optional()
    capabilities: list[str]
    modified_at: str
    license: str = Field(default="")


@router.get("/api/version")
@router.head("/api/version", include_in_schema=False)
async def version() -> Version:
    """The version of Ollama that this API follows, because clients require a minimum."""
    return Version(version=API_VERSION)


@router.get("/api/tags")
@router.head("/api/tags", include_in_schema=False)
async def list_models(request: Request) -> ModelList:
    models = shelf_of(request).models()
    described = await asyncio.to_thread(lambda: [describe(model) for model in models])
    return ModelList(models=[_listed(*entry) for entry in _names(models, described)])


@router.get("/api/ps")
@router.head("/api/ps", include_in_schema=False)
async def list_running(request: Request) -> RunningList:
    models = [model for model in shelf_of(request).models() if model.state == "ready"]
    described = await asyncio.to_thread(lambda: [describe(model) for model in models])
    return RunningList(models=[_running(*entry) for entry in _names(models, described)])


@router.post("/api/show")
async def show(body: ShowRequest, request: Request) -> ModelDescription:
    name, models = body.model_name, shelf_of(request).models()
    model = find_model(models, name)
    if model is None:
        raise unknown_model(name, all_names(models))
    description = await asyncio.to_thread(_show, body, model)
    if request.headers.get("user-agent", "").startswith(COPILOT):
        description.model_info["general.basename"] = name
    return description


def _names(
    models: Sequence[ShelvedModel], described: Sequence[Description | None]
) -> Iterator[tuple[str, ShelvedModel, Description | None]]:
    """Each name of each model, with its description."""
    for model, description in zip(models, described, strict=True):
        for name in model.names:
            yield tagged(name), model, description


def _listed(name: str, model: ShelvedModel, description: Description | None) -> ListedModel:
    return ListedModel(
        name=name,
        model=name,
        modified_at=_modified_at(model, description),
        size=0 if description is None else description.summary.num_bytes,
        digest=UNKNOWN_DIGEST if description is None else description.summary.fingerprint,
        details=Details() if description is None else description.details(model.max_model_len),
        capabilities=[] if description is None else list(description.capabilities),
    )


def _running(name: str, model: ShelvedModel, description: Description | None) -> RunningModel:
    num_file_bytes = 0 if description is None else description.summary.num_bytes
    return RunningModel(
        name=name,
        model=name,
        size=model.num_device_bytes or num_file_bytes,
        digest=UNKNOWN_DIGEST if description is None else description.summary.fingerprint,
        details=Details() if description is None else description.details(model.max_model_len),
        expires_at=rfc3339(NEVER_S if model.expires_s is None else model.expires_s),
        size_vram=model.num_device_bytes or 0,
        context_length=model.max_model_len or 0,
    )


def _modified_at(model: ShelvedModel, description: Description | None) -> str:
    return rfc3339(model.created if description is None else description.summary.modified_s)


def _show(body: ShowRequest, model: ShelvedModel) -> ModelDescription:
    description, files = describe(model), model.files()
    if description is None or files is None:
        return ModelDescription(
            modelfile=f"FROM {model.name}\n",
            parameters="",
            template="",
            system=body.system,
            details=Details(),
            model_info={},
            capabilities=[],
            modified_at=_modified_at(model, None),
        )
    parameters = description.parameters(model.max_model_len)
    verbose = bool(body.verbose)
    tensors = [
        Tensor(name=tensor.name, type=tensor.dtype, shape=list(tensor.shape)) for tensor in description.summary.tensors
    ]
    return ModelDescription(
        modelfile=_modelfile(model.name, description.template, parameters),
        parameters="\n".join(f"{name:<30} {value}" for name, value in parameters.items()),
        template=description.template,
        system=body.system,
        details=description.details(model.max_model_len),
        model_info=description.model_info(model.max_model_len, verbose=verbose, files=files),
        tensors=tensors if verbose else None,
        capabilities=list(description.capabilities),
        modified_at=_modified_at(model, description),
    )


def _modelfile(name: str, template: str, parameters: dict[str, int | float]) -> str:
    """The settings in the syntax of a Modelfile. The template is in Jinja, which Ollama's own Modelfiles are not."""
    lines = ["# Written by tinyvllm; the template is in Jinja", f"FROM {name}"]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    return "\n".join(lines) + "\n"
