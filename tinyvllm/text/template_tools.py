"""The definitions of tools in the form that a chat template can render."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

# The template's variable `tools` without any: templates ask `if tools`, `if tools is defined`, or nothing before they
# loop over them.
WITHOUT_TOOLS = {"none": None, "undefined": jinja2.Undefined(name="tools"), "empty": ()}

Tools = Sequence[Mapping[str, Any]]


def bare(tools: Tools) -> Tools:
    """Functions without `{"type": "function", "function": ...}`."""
    return [tool.get("function", tool) for tool in tools]


def complete(tools: Tools) -> Tools:
    """With an empty description of each function and parameter that has none, and with properties."""
    return [{**tool, "function": _complete_function(tool["function"])} for tool in tools]


def _complete_function(function: Mapping[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": {}, **(function.get("parameters") or {})}
    return {"description": "", **function, "parameters": _complete_schema(schema)}


def _complete_schema(schema: Any) -> Any:
    if not isinstance(schema, Mapping) or not isinstance(schema.get("properties"), Mapping):
        return schema
    properties = {
        name: {"description": "", **_complete_schema(one if isinstance(one, Mapping) else {})}
        for name, one in schema["properties"].items()
    }
    return {"required": [], **schema, "properties": properties}


def plain(tools: Tools) -> Tools:
    """With one type for each parameter: the first alternative of several, and a string where there is none."""
    return [
        {
            **tool,
            "function": {**tool["function"], "parameters": _plain_schema(tool["function"].get("parameters") or {})},
        }
        for tool in tools
    ]


KEPT = ("description", "enum", "default", "required")


def _plain_schema(schema: Any) -> dict[str, Any]:
    schema = schema if isinstance(schema, Mapping) else {}
    alternatives = [one for name in ("anyOf", "oneOf", "allOf") for one in schema.get(name) or ()]
    first = next((one for one in alternatives if isinstance(one, Mapping) and one.get("type") != "null"), {})
    schema = {**first, **schema}
    types = schema.get("type")
    types = [types] if isinstance(types, str) else [one for one in types or () if one != "null"]
    default = "object" if "properties" in schema or "$ref" in schema else "array" if "items" in schema else "string"
    found: dict[str, Any] = {"type": types[0] if types else default}
    found |= {name: schema[name] for name in KEPT if name in schema}
    if found["type"] == "object":
        found["properties"] = {name: _plain_schema(one) for name, one in (schema.get("properties") or {}).items()}
    elif found["type"] == "array":
        found["items"] = _plain_schema(schema.get("items"))
    return found
