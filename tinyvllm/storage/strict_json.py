"""The only reader of JSON in a model's files: what it returns is bounded, and safe to print, compare and encode.

Its rules follow what real files contain:

- `NaN` and `Infinity` are read, though JSON has no such numbers: config.json of Mamba 2 and its kind has a
  `time_step_limit` of `[0.0, Infinity]`. `Values` refuses them where a number is used.
- `1e400` is refused: Python reads it as infinity, which nobody means by it.
- Integers may be beyond 64 bits: most tokenizer_config.json have a `model_max_length` of int(1e30). `Values` bounds
  them where they are used, and Python refuses those of more than 4300 digits.
- A key that an object has twice is accepted if both values are equal. Otherwise it is refused: readers disagree on
  which one counts, and a file must not mean one thing to the tool that checks it and another to the tool that loads it.
- Half a surrogate pair (`"\\ud800"`) is refused: such a text cannot be encoded, printed or hashed.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from tinyvllm.errors import ModelError
from tinyvllm.storage.regular_file import is_present, read_regular

MAX_JSON_BYTES = 1 << 24  # of settings; with those of each quantized module, a model of a trillion weights has 6 MB
MAX_INDEX_BYTES = 1 << 26  # of an index of tensors; of such a model 20 MB
MAX_DEPTH = 64  # of real files: 12, in a quantization_config
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a pair, or of a character beyond 16 bits


def read_json(path: Path, at_most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `at_most` bytes. Raises ModelError."""
    value = parse_json(read_regular(path, at_most), str(path))
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {kind_of(value)}, but must hold a JSON object")
    return value


def read_json_list(path: Path, at_most: int = MAX_JSON_BYTES) -> list[Any]:
    """The list in a JSON file. Raises ModelError."""
    value = parse_json(read_regular(path, at_most), str(path))
    if not isinstance(value, list):
        raise ModelError(f"{path} holds {kind_of(value)}, but must hold a JSON list")
    return value


def read_json_if_present(path: Path, at_most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """As `read_json`; empty if there is no such file."""
    return read_json(path, at_most) if is_present(path) else {}


def parse_json(data: bytes, source: str, *, allows_repeats: bool = True) -> Any:
    """The value of a JSON text in UTF-8. `source`: where it comes from, for messages. `allows_repeats`: whether an
    object may state a key twice with the same value. Raises ModelError."""
    make_object = _object_without_contradictions if allows_repeats else _object_without_repeats
    try:
        value = json.loads(data.decode("utf-8"), parse_float=_finite, object_pairs_hook=make_object)
        if SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # UnicodeEncodeError is a ValueError
    except ValueError as error:
        raise ModelError(f"cannot read {source}: {_without_text(error)}") from error
    except RecursionError:
        raise ModelError(f"cannot read {source}: it is nested more than {MAX_DEPTH} deep") from None
    if is_deeper(value, MAX_DEPTH):
        raise ModelError(f"cannot read {source}: it is nested more than {MAX_DEPTH} deep")
    return value


def is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        if not level:
            return False
        members = (item.values() if isinstance(item, dict) else item for item in level)
        level = [member for items in members for member in items if isinstance(member, (dict, list))]
    return bool(level)


def kind_of(value: Any) -> str:
    """What a value is in JSON's words, for messages."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is beyond the range of a float")
    return number


def _object_without_contradictions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        first: dict[str, Any] = {}
        for key, value in pairs:
            if first.setdefault(key, value) != value:
                raise ValueError(f"{key[:100]!r} is stated twice, with different values")
    return found


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)[:100]!r} is stated twice")
    return found


def _without_text(error: ValueError) -> str:
    """The error's text. That of UnicodeError has the whole text that it failed on."""
    if isinstance(error, UnicodeEncodeError):
        return "a text has half of a surrogate pair"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}"
    return str(error)
