"""The models that a server has, loaded or not: what the routes that list models read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from tinyvllm.errors import ModelError
from tinyvllm.server.memory import memory_by_kind
from tinyvllm.server.model_names import is_name_of
from tinyvllm.storage.resolve import resolve_model

if TYPE_CHECKING:
    from starlette.requests import Request

    from tinyvllm.config import ModelFiles
    from tinyvllm.server.state import ServerState

LoadState = Literal["unloaded", "loading", "ready", "failed"]


@dataclass(frozen=True, kw_only=True)
class ShelvedModel:
    """A model, loaded or not, under the names that requests may use."""

    name: str
    aliases: tuple[str, ...] = ()
    model: str  # as it was given: catalog name, directory, file or hub id. A path stays on this machine
    root: str  # the name in the model's own files; of an adapter, that of its directory
    parent: str | None = None  # of an adapter, the name of the model that it belongs to
    created: int  # Unix time
    state: LoadState
    max_model_len: int | None = None  # None until it is loaded for the first time
    num_device_bytes: int | None = None  # of weights and KV cache while it is loaded
    chat_template: str | None = None  # a file that replaces the model's own template
    reasoning_parser: str | None = None  # as in EngineConfig
    expires_s: float | None = None  # Unix time when it will be unloaded unless it is used; None: never

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def adapter(self, name: str, path: str, loaded_s: float | None = None) -> ShelvedModel:
        """An adapter of it, as a model. loaded_s: Unix time; None: with the model."""
        return replace(
            self,
            name=name,
            aliases=(),
            root=Path(path).name,
            parent=self.name,
            created=self.created if loaded_s is None else int(loaded_s),
            num_device_bytes=None,
        )

    def files(self) -> ModelFiles | None:
        """None if they are not on this machine."""
        try:
            return resolve_model(self.model)
        except ModelError:
            return None


def find_model(models: Sequence[ShelvedModel], name: str) -> ShelvedModel | None:
    return next((model for model in models if is_name_of(name, model.names)), None)


def all_names(models: Sequence[ShelvedModel]) -> list[str]:
    """The names and aliases of all models."""
    return [name for model in models for name in model.names]


class Shelf(Protocol):
    """All models of one server. Used on its event loop."""

    def models(self) -> Sequence[ShelvedModel]: ...


class SingleModel:
    """The shelf of a server with one engine, or several of the same model, which stays loaded."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def models(self) -> Sequence[ShelvedModel]:
        engine = self._state.engine
        is_ready = engine.is_ready and engine.error is None
        config = engine.config
        model = ShelvedModel(
            name=engine.served_model_name,
            aliases=self._state.settings.model_aliases,
            model=config.model,
            root=(engine.model_config.name if is_ready else "") or engine.served_model_name,
            created=engine.created,
            state="failed" if engine.error is not None else "ready" if is_ready else "loading",
            max_model_len=engine.capacity.max_model_len if is_ready else None,
            num_device_bytes=self._num_device_bytes() if is_ready else None,
            chat_template=config.chat_template,
            reasoning_parser=config.reasoning_parser,
        )
        return [model, *[model.adapter(info.name, info.path, info.loaded_s) for info in engine.adapters()]]

    def _num_device_bytes(self) -> int:
        engine = self._state.engine
        return sum(memory_by_kind(engine.capacity, engine.stats(), engine.num_engines).values())


def shelf_of(request: Request) -> Shelf:
    shelf: Shelf = request.app.state.shelf
    return shelf
