"""Tools on the wire: their definitions, and tool_choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tinyvllm.errors import RequestError
from tinyvllm.text.tools.base import Tool

MAX_TOOLS = 128  # OpenAI's limit

ToolName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]


class Function(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    function: Function

    def as_tool(self, param: str) -> Tool:
        function = self.function
        return Tool(
            name=function.name,
            description=function.description or "",
            parameters=function.parameters or None,
            is_strict=bool(function.strict),
            param=f"{param}.function.parameters",
        )

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: without nulls and without fields that only the server needs."""
        function = self.function
        shown = {"name": function.name, "description": function.description or "", "parameters": function.parameters}
        return {"type": "function", "function": shown | ({} if function.parameters else {"parameters": _NO_PARAMETERS})}


_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class NamedChoice:
    """A tool_choice that names a function."""

    name: str


def _check_tool_choice(value: object) -> object:
    """A keyword, or a function's name: in the nested form of chat completions, or the flat one of responses."""
    if value is None or value in ("none", "auto", "required"):
        return value
    named = value.get("function", value) if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(named, dict) and isinstance(named.get("name"), str):
        return NamedChoice(name=named["name"])
    raise ValueError('give "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}')


ToolChoice = Annotated[
    Any,
    BeforeValidator(
        _check_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | dict[str, Any] | None
    ),
]


def check_names(names: list[str], param: str) -> None:
    """Raise RequestError if two tools have the same name."""
    for position, name in enumerate(names):
        if name in names[:position]:
            raise RequestError(
                f"{param}.{position} is named {name!r}, as another one is: give each its own name",
                param=f"{param}.{position}",
            )


def check_choice(name: str, names: list[str]) -> None:
    """Raise RequestError if `name` is not one of the tools' `names`."""
    if name not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise RequestError(f"tool_choice names {name!a:.80}, but tools has {known:.300}", param="tool_choice")
