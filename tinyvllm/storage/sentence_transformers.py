"""How an embedding model pools its tokens' states: the files that sentence-transformers writes beside the model's own.

`modules.json` lists what runs one after another: the model itself, a pooling, whose folder has a config.json, and
perhaps a normalization to length 1.
"""

from __future__ import annotations

from pathlib import Path

from tinyvllm.errors import UnsupportedModelError
from tinyvllm.storage.regular_file import file_inside, is_present
from tinyvllm.storage.safetensors_header import read_header
from tinyvllm.storage.strict_json import MAX_INDEX_BYTES, read_json, read_json_list
from tinyvllm.storage.values import Values

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
    if not is_present(path):
        return None
    pooling = None
    for module in Values(path, {MODULES: read_json_list(path)}).inners(MODULES):
        kind = module.text("type", "")
        if not kind.endswith(SUFFIXES):
            raise UnsupportedModelError(
                f"{path} has the module {kind!r}, which is not supported; known: {', '.join(SUFFIXES)}"
            )
        if kind.endswith("Pooling"):
            config = file_inside(directory, f"{module.text('path', '1_Pooling')}/config.json", path)
            pooling = _mode(Values(config, read_json(config)))
    return pooling


def tensor_names(directory: Path) -> set[str]:
    """Of the tensors in a directory's safetensors: from their index, or from the headers of the files."""
    index = directory / "model.safetensors.index.json"
    if is_present(index):
        weight_map = Values(index, read_json(index, MAX_INDEX_BYTES)).inner("weight_map")
        return set() if weight_map is None else set(weight_map.values)
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        names |= set(read_header(path))
    return names


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
