"""The schemas of tools that Anthropic defines and the client runs: bash, the text editor, memory.

Requests give them a dated type and no schema, because Claude was trained on them. Other models are shown the schema, as
for any tool. https://docs.anthropic.com/en/docs/agents-and-tools/tool-use
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinyvllm.text.tools.base import Tool

_TEXT = {"type": "string"}
_PROPERTIES: Mapping[str, Mapping[str, Any]] = {
    "path": {**_TEXT, "description": "The file or directory, as an absolute path."},
    "old_path": {**_TEXT, "description": "For rename: the present path."},
    "new_path": {**_TEXT, "description": "For rename: the path to move to."},
    "file_text": {**_TEXT, "description": "For create: the file's content."},
    "old_str": {**_TEXT, "description": "For str_replace: the text to replace, which must occur exactly once."},
    "new_str": {**_TEXT, "description": "For str_replace: the text to put in its place."},
    "insert_line": {
        "type": "integer",
        "description": "For insert: the line to insert after; 0 is the top of the file.",
    },
    "insert_text": {**_TEXT, "description": "For insert: the text to insert."},
    "view_range": {
        "type": "array",
        "items": {"type": "integer"},
        "description": "For view: the first and the last line to show; -1 is the end of the file.",
    },
}
_EDITOR = ("path", "file_text", "old_str", "new_str", "insert_line")


def client_tool(kind: str, *, is_strict: bool, param: str) -> Tool | None:
    """The tool of this type, without a name yet; None for a type that is not in this file."""
    family, _, version = kind.rpartition("_")
    if re.fullmatch(r"\d{8}", version) is None:
        return None
    match family:
        case "bash":
            description = "Run a command in a bash shell, which keeps its state between calls."
            schema = _object(
                {
                    "command": {**_TEXT, "description": "The command to run."},
                    "restart": {"type": "boolean", "description": "Start the shell anew instead."},
                }
            )
        case "text_editor":
            description = "View, create and edit text files."
            commands = ["view", "create", "str_replace", "insert"]
            # before July 2025, `insert` took its text as new_str; before April 2025, there was `undo_edit`
            names = [*_EDITOR, *(["insert_text"] if version >= "20250728" else []), "view_range"]
            schema = _commands(commands if version >= "20250429" else [*commands, "undo_edit"], names, ["path"])
        case "memory":
            description = "Keep notes in files below /memories, for later conversations. View the directory first."
            names = [*_EDITOR, "insert_text", "view_range", "old_path", "new_path"]
            schema = _commands(["view", "create", "str_replace", "insert", "delete", "rename"], names, [])
        case _:
            return None
    return Tool(name="", description=description, parameters=schema, is_strict=is_strict, param=param)


def _commands(commands: Sequence[str], names: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    properties = {name: _PROPERTIES[name] for name in names}
    return _object({"command": {**_TEXT, "enum": commands}, **properties}, ["command", *required])


def _object(properties: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
