"""Helpers for messages that chat templates and the formats of tool calls share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def calls_of(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return message.get("tool_calls") or ()


def with_result_names(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Results with the name of the function that was called."""
    names: dict[str, str] = {}
    found: list[Mapping[str, Any]] = []
    for message in messages:
        names |= {call.get("id", ""): call.get("function", {}).get("name", "") for call in calls_of(message)}
        name = names.get(message.get("tool_call_id", ""))
        if message.get("role") == "tool" and name and not message.get("name"):
            message = {**message, "name": name}
        found.append(message)
    return found


def with_parsed_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The call with its arguments as an object, unless they are text that is not a JSON object."""
    function = call.get("function", {})
    return {**call, "function": {**function, "arguments": parse_object(function.get("arguments"))}}


def parse_object(arguments: Any) -> Any:
    """The arguments of a call as chat templates expect them: an object, or the text if it is not one in JSON."""
    if not isinstance(arguments, str | None):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def as_object(arguments: Any) -> Mapping[str, Any]:
    """Arguments for formats that can only write objects: any other value becomes that of `arguments`."""
    return arguments if isinstance(arguments, Mapping) else {"arguments": arguments}
