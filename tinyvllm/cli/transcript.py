"""Conversations as files: Markdown to read, JSON to load again."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyvllm.errors import TinyvllmError

Messages = Sequence[Mapping[str, Any]]
TITLES = {"system": "System", "user": "User", "assistant": "Assistant"}
MARKDOWN, JSON = (".md", ".markdown"), (".json",)


def save(name: str, model: str, messages: Messages) -> Path:
    """Write the conversation in the format of the suffix, atomically, and return the path.

    Raises TinyvllmError."""
    path = Path(name).expanduser().absolute()
    suffix = path.suffix.lower()
    if suffix in JSON:
        text = json.dumps({"model": model, "messages": list(messages)}, ensure_ascii=False, indent=1) + "\n"
    elif suffix in MARKDOWN:
        text = as_markdown(model, messages)
    else:
        raise TinyvllmError(f"{name!r} is neither .md nor .json: name a file with one of these suffixes")
    try:
        _write(path, text)
    except OSError as error:
        raise TinyvllmError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def load(name: str) -> list[dict[str, Any]]:
    """The messages of a JSON file that `save` or another program wrote: {"messages": [{"role", "content"}, ...]}.

    Raises TinyvllmError."""
    path = Path(name).expanduser()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TinyvllmError(f"{path} cannot be loaded: {error}") from error
    messages = document.get("messages") if isinstance(document, dict) else document
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise TinyvllmError(
            f"{path} has no conversation: it needs 'messages', a list of objects with a role (one of "
            f"{', '.join(TITLES)}) and a text as content"
        )
    return messages


def as_markdown(model: str, messages: Messages) -> str:
    parts = [f"# A conversation with {model}"]
    for message in messages:
        parts.append(f"## {TITLES[message['role']]}")
        if reasoning := message.get("reasoning_content"):
            parts.append("\n".join(f"> {line}".rstrip() for line in str(reasoning).strip().splitlines()))
        parts.append(str(message["content"]).strip())
    return "\n\n".join(parts) + "\n"


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in TITLES and isinstance(value.get("content"), str)


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
