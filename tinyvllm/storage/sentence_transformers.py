"""How an embedding model pools its tokens' states: the files that sentence-transformers writes beside the model's own.

`modules.json` lists what runs one after another: the model itself, a pooling, whose folder has a config.json, and
perhaps a normalization to length 1.
"""

from __future__ import annotations

import json
from pathlib import Path

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.stored_dtype import read_header
from tinyvllm.storage.values import Values, read_json

MODULES = "modules.json"
# pooling_mode_*, and the values of pooling_mode in files since version 5.2, by our names
MODES = {"last": ("pooling_mode_lasttoken", "lasttoken"), "mean": ("pooling_mode_mean_tokens", "mean")}
MODES["cls"] = ("pooling_mode_cls_token", "cls")
HEAD_NAME = "lm_head.weight"
SUFFIXES = ("Transformer", "Pooling", "Normalize")  # classes of modules that we have


def read_pooling(directory: Path) -> str | None:
    """ "last", "mean" or "cls"; None for a model that is not sentence-transformers'.

    Raises UnsupportedModelError for other modules and modes, ModelError for a file that cannot be read.
    """
    path = directory / MODULES
    if not path.is_file():
        return None
    pooling = None
    for module in _read_list(path):
        kind = str(module.get("type", ""))
        if not kind.endswith(SUFFIXES):
            raise UnsupportedModelError(
                f"{path} has the module {kind!r}, which is not supported; known: {', '.join(SUFFIXES)}"
            )
        if kind.endswith("Pooling"):
            config = directory / str(module.get("path", "1_Pooling")) / "config.json"
            pooling = _mode(Values(config, read_json(config)))
    return pooling


def tensor_names(directory: Path) -> set[str]:
    """Of the tensors in a directory's safetensors: from their index, or from the headers of the files."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        return set(weight_map) if isinstance(weight_map, dict) else set()
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        try:
            names |= set(read_header(path))
        except ValueError as error:
            raise ModelError(f"{path} is cut short or damaged ({error}); download it again") from error
    return names


def _read_list(path: Path) -> list[dict[str, object]]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{path} is not a list of modules")
    return modules


def _mode(values: Values) -> str:
    known = ", ".join(flag for flag, _ in MODES.values())
    stated = values.get("pooling_mode")
    on = [key for key in values.values if key.startswith("pooling_mode_") and values.get(key) is True]
    found = [name for name, (flag, value) in MODES.items() if (stated == value if stated is not None else on == [flag])]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{values.source}: pooling {stated or ', '.join(on) or 'none'} is not supported; known: {known}"
        )
    return found[0]
