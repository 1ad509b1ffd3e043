"""Flags of `tinyvllm serve` for several models, and the TOML file that describes them."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import msgspec
from typer import Argument, Option

from tinyvllm.cli.flags import SERVED_STRETCH, EngineFlags, RunnerFlags
from tinyvllm.config import DEVICE_VARIABLE, MODELS_DIR_VARIABLE, LoraModule
from tinyvllm.errors import TinyvllmError
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from tinyvllm.door.settings import DoorSettings, ModelSettings

Models = Annotated[
    list[str] | None,
    Argument(
        metavar="[NAME=]MODEL",
        help="One or more models, each a catalog name (see `tinyvllm models`), a downloaded org/name, a .gguf file, or "
        "a directory in Hugging Face format. NAME: what clients call it. "
        f"Downloads are kept in ${MODELS_DIR_VARIABLE}. [default: {DEFAULT_MODEL}]",
        show_default=False,
    ),
]
# Keys of a model's table, besides the flags of the engine
OWN_KEYS = ("model", "name", "aliases", "pinned", "keep_alive")
TOP_KEYS = ("models", "keep_alive", "max_loaded", "load_timeout")
# Flags that are the same for all models
SHARED_FLAGS = ("pull", "log_level")


@dataclasses.dataclass(frozen=True)
class DoorFlags:
    """Several models: which ones, how many at once, and how long they stay loaded."""

    config: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="TOML file with a [[models]] table for each model: model, name, aliases, pinned, keep_alive, and any "
            "engine flag under its name (max_model_len = 8192); above them keep_alive, max_loaded and load_timeout.",
        ),
    ] = None
    keep_alive: Annotated[
        str | None,
        Option(
            metavar="TIME",
            help="Unload a model that has been idle for this long: 5m, 1h30m, seconds, 0 (at once) or -1 (never). A "
            "single model is then also loaded at its first request. [default: 5m with several models]",
            show_default=False,
        ),
    ] = None
    max_loaded: Annotated[
        int | None,
        Option(
            metavar="COUNT",
            help="Maximum models loaded at once. They share the memory equally; the least recently used one makes room "
            "for another. [default: 3]",
            show_default=False,
        ),
    ] = None
    load_timeout: Annotated[
        float | None,
        Option(
            metavar="SECONDS",
            help="Maximum time that a request waits for its model, and that a load may take. [default: 300]",
            show_default=False,
        ),
    ] = None
    pin: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="Load this model at startup, and never unload it. Repeatable.", show_default=False),
    ] = None

    def applies(self, models: Sequence[str]) -> bool:
        """Whether these models need a door, rather than a single server."""
        given = (self.config, self.keep_alive, self.max_loaded, self.load_timeout, self.pin)
        return len(models) > 1 or any(value is not None for value in given)

    def settings(
        self, models: Sequence[str], names: Sequence[str], engine: EngineFlags, num_front_ends: int
    ) -> DoorSettings:
        """The door's settings. names: of --served-model-name. Raises TinyvllmError for settings that are wrong."""
        from tinyvllm.door.settings import DoorSettings

        top, tables = _read_toml(self.config) if self.config is not None else ({}, [])
        if names and len(models) + len(tables) != 1:
            raise TinyvllmError("--served-model-name names a single model: with several, write NAME=MODEL")
        tables += [_table_of(text) for text in models]
        if names:
            tables[0] = {**tables[0], "name": names[0], "aliases": list(names[1:])}
        found = [_model_settings(table, self.pin or (), engine, num_front_ends) for table in tables]
        _check_adapters(engine, [model.name for model in found])
        unknown = set(self.pin or ()) - {model.name for model in found}
        if unknown:
            known = ", ".join(model.name for model in found)
            raise TinyvllmError(f"--pin names {', '.join(sorted(unknown))}, which is not served: give one of {known}")
        given: dict[str, Any] = {}
        if (keep_alive := _first(self.keep_alive, top.get("keep_alive"))) is not None:
            given["keep_alive_s"] = _duration("keep_alive", keep_alive)
        if (max_loaded := _first(self.max_loaded, top.get("max_loaded"))) is not None:
            given["max_loaded"] = _value("max_loaded", max_loaded, int)
        if (load_timeout := _first(self.load_timeout, top.get("load_timeout"))) is not None:
            given["load_timeout_s"] = _value("load_timeout", load_timeout, float)
        return DoorSettings(models=found, **given)


def _check_adapters(engine: EngineFlags, names: Sequence[str]) -> None:
    """Raise TinyvllmError if the flag's adapters do not say to which of several models they belong."""
    known = ", ".join(names)
    for module in map(LoraModule.of, engine.lora_modules or ()):
        if len(names) > 1 and not module.base_model:
            raise TinyvllmError(
                f"--lora-modules does not say which of {known} {module.name!r} belongs to: give "
                f'\'{{"name": "{module.name}", "path": "{module.path}", "base_model_name": "{names[0]}"}}\''
            )
        if module.base_model and module.base_model not in names:
            raise TinyvllmError(
                f"--lora-modules says that {module.name!r} belongs to {module.base_model!r}, which is not served: give "
                f"one of {known}"
            )


def _first(flag: object, value: object) -> object:
    """The flag if given, else the file's value."""
    return value if flag is None else flag


def split_name(text: str) -> tuple[str | None, str]:
    """(NAME, MODEL) of NAME=MODEL; (None, MODEL) of a model alone, whose path may have a =."""
    name, equals, model = text.partition("=")
    if not equals or "/" in name or Path(text).expanduser().exists():
        return None, text
    return name, model


def _table_of(text: str) -> dict[str, Any]:
    name, model = split_name(text)
    return {"model": model} if name is None else {"model": model, "name": name}


def _read_toml(file: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The file's settings for all models, and a table for each model. Dashes in keys become underscores."""
    try:
        document = _underscored(tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TinyvllmError(f"--config {file} cannot be read: {error}") from error
    _check_keys(f"--config {file}", document, TOP_KEYS)
    tables = document.get("models")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise TinyvllmError(f"--config {file} has no models: write a [[models]] table for each")
    return document, [_underscored(table) for table in tables]


def _underscored(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in table.items()}


def _check_keys(where: str, table: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        raise TinyvllmError(f"{where} has the unknown key {unknown[0]!r}: the keys are {', '.join(known)}")


def _model_settings(
    table: Mapping[str, Any], pinned: Collection[str], engine: EngineFlags, num_front_ends: int
) -> ModelSettings:
    from tinyvllm.cli.models import require_model
    from tinyvllm.door.settings import ModelSettings

    flags = [field.name for field in dataclasses.fields(EngineFlags) if field.name not in SHARED_FLAGS]
    where = f"the model {table.get('name') or table.get('model')!r}"
    _check_keys(where, table, (*OWN_KEYS, *flags))
    if "model" not in table:
        raise TinyvllmError(f"{where} has no key 'model': give its catalog name, path or hub id")
    model = _value("model", table["model"], str)
    name = _value("name", table.get("name") or require_model(model, pull=engine.pull).name, str)
    overrides = dict(_overrides({key: value for key, value in table.items() if key in flags}))
    device = overrides.pop("device", None)
    config = dataclasses.replace(engine, **overrides).make_config(
        model, warm_up="background", max_step_stretch=SERVED_STRETCH, served_model_name=name
    )
    if "lora_modules" not in table:  # those of the flag are for all models
        mine = tuple(one for one in config.lora_modules if one.base_model in ("", name))
        config = dataclasses.replace(config, lora_modules=mine)
    share = overrides.get("gpu_memory_utilization")  # of the whole memory; the door divides the rest
    config = dataclasses.replace(config, gpu_memory_utilization=engine.gpu_memory_utilization)
    keep_alive = table.get("keep_alive")
    return ModelSettings(
        name=name,
        aliases=tuple(_value("aliases", table.get("aliases", []), list[str])),
        config=config,
        pinned=_value("pinned", table.get("pinned", False), bool) or name in pinned,
        keep_alive_s=None if keep_alive is None else _duration("keep_alive", keep_alive),
        memory_share=share,
        environment={} if device is None else {DEVICE_VARIABLE: device},
        num_front_ends=num_front_ends,
    )


def _overrides(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The engine's flags that a table sets, by the types of the flags."""
    hints = get_type_hints(RunnerFlags) | get_type_hints(EngineFlags)
    for key, value in given.items():
        if key == "max_model_len" and isinstance(value, int):
            value = str(value)  # the flag takes "auto", too
        if key == "speculative_config" and isinstance(value, dict):
            value = json.dumps(_underscored(value))  # a table, in place of the flag's JSON
        yield key, _value(key, value, hints[key])


def _value(key: str, value: object, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise TinyvllmError(f"{key} is {value!r}: {str(error)[:1].lower()}{str(error)[1:]}") from error


def _duration(key: str, value: object) -> float:
    from tinyvllm.server.ollama.keep_alive import read_duration

    try:
        seconds = read_duration(value)
    except ValueError as error:
        raise TinyvllmError(f"{key} is {value!r}: {error}") from error
    assert isinstance(seconds, float), f"{key} is {value!r}"
    return seconds
