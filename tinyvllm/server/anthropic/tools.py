"""Tools of Anthropic's API: their definitions, and tool_choice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tinyvllm.errors import RequestError
from tinyvllm.server.anthropic.client_tools import client_tool
from tinyvllm.server.anthropic.history import inline_definition
from tinyvllm.server.notices import warn_once
from tinyvllm.server.openai.protocol.tools import check_choice, check_names
from tinyvllm.text.tools.base import Tool

if TYPE_CHECKING:
    from tinyvllm.server.anthropic.protocol import Message, ToolChoice

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class OfferedTools:
    """The tools that the model may call. `shown` are at the beginning of the prompt. The others are deferred: they are
    described where a message first names them, so that cached prefixes stay valid."""

    tools: Sequence[Tool]
    shown: Sequence[Tool]

    @classmethod
    def read(cls, definitions: Sequence[Mapping[str, Any]], messages: Sequence[Message]) -> OfferedTools:
        """Leaves out and logs tools that a server would have to run (web search, code execution) or that need images
        (computer use). Raises RequestError, naming the field, for an incomplete definition."""
        tools: list[Tool] = []
        deferred: list[Tool] = []
        is_searched_here = True
        for position, definition in enumerate(definitions):
            tool = _read(definition, f"tools.{position}")
            if tool is None:
                kind = str(definition["type"])
                warn_once("tools of type %s cannot be run here and are left out", kind)
                is_searched_here = is_searched_here and not kind.startswith("tool_search_tool")
            else:
                (deferred if definition.get("defer_loading") is True else tools).append(tool)
        check_names([tool.name for tool in (*tools, *deferred)], "tools")
        # all are shown if the search that finds them is one that this server lacks, or if there is nothing else to call
        shown = tools if tools and is_searched_here else [*tools, *deferred]
        named = {tool.name: tool for tool in (*tools, *deferred, *_inline_tools(messages))}  # the latest of each name
        return cls(tools=list(named.values()), shown=shown or list(named.values()))

    def for_template(self) -> list[dict[str, Any]]:
        return [{"type": "function", "function": _function(tool)} for tool in self.shown]

    def describe(self, name: str) -> str:
        """What a message says about a tool that can be called from there on."""
        tool = next((tool for tool in self.tools if tool.name == name and tool not in self.shown), None)
        if tool is None:
            return f"The tool {name} is available."
        return f"This tool is available: {json.dumps(_function(tool), ensure_ascii=False)}"

    def choice(self, given: ToolChoice | None) -> dict[str, Any]:
        """The fields of Conversation that `given` sets. Raises RequestError if it names an unknown tool."""
        if given is None:
            return {}
        names = [tool.name for tool in self.tools]
        is_parallel = given.disable_parallel_tool_use is not True
        match given.type:
            case "any" if not names:
                raise RequestError("tool_choice is 'any', but no tool is left to call: send some", param="tool_choice")
            case "any":
                return {"tool_choice": "required", "is_parallel": is_parallel}
            case "tool":
                if given.name is None:
                    raise RequestError("tool_choice.name is required and missing", param="tool_choice.name")
                check_choice(given.name, names)
                return {"tool_choice": "required", "named_tool": given.name, "is_parallel": False}
            case "none":
                return {"tool_choice": "none"}
            case _:
                return {"is_parallel": is_parallel}


def _read(definition: Mapping[str, Any], param: str) -> Tool | None:
    """None for a tool that is left out."""
    kind, is_strict = definition.get("type"), definition.get("strict") is True
    if kind in (None, "custom"):
        return _custom(definition, _name(definition, param), is_strict=is_strict, param=param)
    tool = client_tool(str(kind), is_strict=is_strict, param=param)
    return None if tool is None else replace(tool, name=_name(definition, param))


def _name(definition: Mapping[str, Any], param: str) -> str:
    name = definition.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise RequestError(
            f"{param}.name is {name!a:.80}: give 1 to 128 letters, digits, underscores, dots and hyphens",
            param=f"{param}.name",
        )
    return name


def _inline_tools(messages: Sequence[Message]) -> Iterator[Tool]:
    """The tools that system messages define."""
    for position, message in enumerate(messages):
        for number, block in enumerate(message.content if isinstance(message.content, list) else []):
            definition = inline_definition(block)
            if message.role == "system" and definition is not None:
                tool = _read(definition, f"messages.{position}.content.{number}.tool.definition")
                if tool is not None:
                    yield tool


def _function(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters or _NO_PARAMETERS}


def _custom(definition: Mapping[str, Any], name: str, *, is_strict: bool, param: str) -> Tool:
    schema = definition.get("input_schema")
    if not isinstance(schema, dict):
        raise RequestError(f"{param}.input_schema is missing or is not an object", param=f"{param}.input_schema")
    description = definition.get("description")
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{param}.description is not a string", param=f"{param}.description")
    return Tool(
        name=name,
        description=description or "",
        parameters=schema or None,
        is_strict=is_strict,
        param=f"{param}.input_schema",
    )
