"""The definitions of tools in the form that a chat template can render."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

# The template's variable `tools` when there are none: before looping over it, templates check `if tools`,
# `if tools is defined`, or nothing.
WITHOUT_TOOLS = {"none": None, "undefined": jinja2.Undefined(name="tools"), "empty": ()}

Tools = Sequence[Mapping[str, Any]]


def bare(tools: Tools) -> Tools:
    """Functions without `{"type": "function", "function": ...}`."""
    return [tool.get("function", tool) for tool in tools]


def describe_in_system(messages: Sequence[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    """The messages with the functions as JSON text in `tools` of the first system message, or of a new one."""
    text = json.dumps(bare(tools), ensure_ascii=False)
    first, rest = ({"role": "system", "content": ""}, messages)
    if messages and messages[0].get("role") == "system":
        first, rest = messages[0], messages[1:]
    return [{**first, "tools": text}, *rest]


def complete(tools: Tools) -> Tools:
    """Add an empty description to functions and parameters without one, and missing properties."""
    return [{**tool, "function": _complete_function(tool["function"])} for tool in tools]


def _complete_function(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = _with(function.get("parameters") or {}, type="object", properties={})
    return _with({**function, "parameters": _complete_schema(schema)}, description="")


def _complete_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return schema
    properties = {
        name: _with(_complete_schema(one if isinstance(one, Mapping) else {}), description="")
        for name, one in properties.items()
    }
    return _with({**schema, "properties": properties}, required=[])


def _with(given: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Add defaults at the end, so that what is complete is unchanged."""
    return {**given, **{name: value for name, value in defaults.items() if name not in given}}


def plain(tools: Tools) -> Tools:
    """Give each parameter one type: the first of several alternatives, and a string if there is none."""
    return [
        {**tool, "function": {**tool["function"], "parameters": _plain(tool["function"].get("parameters") or {})}}
        for tool in tools
    ]


ALTERNATIVES = ("anyOf", "oneOf", "allOf")
KEPT = ("description", "enum", "default", "properties", "required", "items")


def _plain(schema: Any) -> dict[str, Any]:
    found = dict(schema) if isinstance(schema, Mapping) else {}
    if not isinstance(found.get("type"), str):
        found = _of_one_type(found)
    if isinstance(found.get("properties"), Mapping):
        found["properties"] = {name: _plain(one) for name, one in found["properties"].items()}
    if "items" in found:
        found["items"] = _plain(found["items"])
    return found


def _of_one_type(schema: Mapping[str, Any]) -> dict[str, Any]:
    alternatives = [one for name in ALTERNATIVES for one in schema.get(name) or () if isinstance(one, Mapping)]
    first = next((one for one in alternatives if one.get("type") != "null"), {})
    schema = {**first, **schema}
    types = schema.get("type")
    types = [types] if isinstance(types, str) else [one for one in types or () if one != "null"]
    is_object = "properties" in schema or "$ref" in schema
    default = "object" if is_object else "array" if "items" in schema else "string"
    return {"type": types[0] if types else default} | {name: schema[name] for name in KEPT if name in schema}
