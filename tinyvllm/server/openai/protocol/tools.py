"""Tools on the wire: definitions, what a model is offered, and tool_choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tinyvllm.errors import RequestError
from tinyvllm.server.notices import warn_once
from tinyvllm.text.tools.base import Tool
from tinyvllm.text.tools.custom import InputGrammar, custom_tool, pattern_of

MAX_TOOLS = 1024  # more than OpenAI's 128: agents pass on all tools of all their MCP servers

ToolName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_.-]+$")]


class Function(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def offer(self, param: str) -> Offer:
        """param: path of the function in the request, for messages."""
        tool = Tool(
            name=self.name,
            description=self.description or "",
            parameters=self.parameters or None,
            is_strict=bool(self.strict),
            param=f"{param}.parameters",
        )
        return Offer(self.name, tool)


class GrammarDefinition(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    syntax: Literal["lark", "regex"]
    definition: str


class InputFormat(BaseModel):
    """The format of a custom tool's input. Responses have the grammar's fields in here, chats in `grammar`."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None
    grammar: GrammarDefinition | None = None

    def input_grammar(self, param: str) -> InputGrammar | None:
        if self.type == "text":
            return None
        if self.grammar is not None:
            return InputGrammar(self.grammar.syntax, self.grammar.definition)
        if self.syntax is None or self.definition is None:
            raise RequestError(f"{param} needs a syntax and a definition of the grammar", param=param)
        return InputGrammar(self.syntax, self.definition)


class Custom(BaseModel):
    """A tool whose calls carry free text."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: ToolName
    description: str | None = None
    format: InputFormat | None = None

    def offer(self, param: str) -> Offer:
        """param: path of the tool in the request, for messages."""
        grammar = None if self.format is None else self.format.input_grammar(f"{param}.format")
        pattern, fault = None, None
        try:
            pattern = None if grammar is None else pattern_of(grammar)
        except ValueError as error:
            fault = str(error)
        tool = custom_tool(self.name, self.description or "", grammar, pattern, param)
        return Offer(self.name, tool, kind="custom", fault=fault)


@dataclass(frozen=True)
class Offer:
    """A tool as the model is offered it and as the client knows it."""

    name: str  # the client's
    tool: Tool  # the model's, perhaps with another name
    namespace: str | None = None
    kind: Literal["function", "custom", "tool_search"] = "function"  # how its calls are returned
    fault: str | None = None  # why the grammar of that text cannot be enforced, if so

    @property
    def is_custom(self) -> bool:
        """Whether its calls carry free text."""
        return self.kind == "custom"

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it: without nulls and fields that only the server needs."""
        tool = self.tool
        function = {"name": tool.name, "description": tool.description, "parameters": tool.shown_parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request."""

    offers: Sequence[Offer] = ()
    left_out: Sequence[str] = ()  # types of tools that only a hosted service can run

    def check(self, param: str) -> None:
        """Raise RequestError if two tools have the same name. param: the field that they are in."""
        check_names([offer.tool.name for offer in self.offers], param)

    def find(self, tool_name: str) -> Offer | None:
        """The tool that the model calls by this name."""
        return next((offer for offer in self.offers if offer.tool.name == tool_name), None)


NO_TOOLS = Toolbox()


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


# ---- Definitions in chats ----


class ChatTool(BaseModel):
    """A tool of chat completions. `type` determines the other fields."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function", "custom"]
    function: Function | None = None
    custom: Custom | None = None

    def offer(self, param: str) -> Offer:
        """param: path of the tool in the request, for messages."""
        definition = self.function if self.type == "function" else self.custom
        if definition is None:
            raise RequestError(f"{param}.{self.type} is required and missing", param=f"{param}.{self.type}")
        return definition.offer(f"{param}.{self.type}")


# ---- tool_choice ----


@dataclass(frozen=True)
class NamedChoice:
    """A tool_choice that names a tool; without a name, a type of tools that a hosted service runs."""

    name: str | None
    kind: str = "function"
    namespace: str | None = None  # all of its tools; in allowed tools only

    def find(self, toolbox: Toolbox) -> Offer:
        """The tool that is named. Raises RequestError if there is none."""
        of_kind = [offer for offer in toolbox.offers if offer.kind == self.kind]
        if self.name is None and of_kind:
            return of_kind[0]
        if self.name is None:
            raise RequestError(
                f"tool_choice names the tool {self.kind!a:.80}, which this server cannot run: name a function or a "
                "custom tool, or send 'auto'",
                param="tool_choice",
            )
        found = next((offer for offer in of_kind if self.name in (offer.name, offer.tool.name)), None)
        if found is None:
            check_choice(self.name, [offer.name for offer in of_kind])
        assert found is not None, self
        return found

    def allowed(self, toolbox: Toolbox) -> Sequence[Offer]:
        """The tools that it allows; none for a type that is left out. Raises RequestError for an unknown name."""
        if self.namespace is not None:
            return [offer for offer in toolbox.offers if offer.namespace == self.namespace]
        if self.name is None:
            return [offer for offer in toolbox.offers if offer.kind == self.kind]
        return [self.find(toolbox)]


@dataclass(frozen=True)
class AllowedChoice:
    """A tool_choice that lets the model call some of the tools."""

    mode: Literal["auto", "required"]
    tools: Sequence[NamedChoice]


_FORMS = 'give "none", "auto", "required", {"type": "function", "name": "..."} or an object of type allowed_tools'


def _check_tool_choice(value: object) -> object:
    """A keyword, a tool's name, or allowed tools: in the nested form of chat completions, or the flat one of
    responses."""
    if value is None or value in ("none", "auto", "required"):
        return value
    if not isinstance(value, dict):
        raise ValueError(_FORMS)
    if value.get("type") != "allowed_tools":
        return _named_choice(value)
    allowed = value.get("allowed_tools", value)
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    if not isinstance(tools, list) or allowed.get("mode") not in ("auto", "required"):
        raise ValueError('allowed_tools needs a mode, "auto" or "required", and a list of tools')
    return AllowedChoice(allowed["mode"], [_named_choice(tool) for tool in tools])


def _named_choice(value: object) -> NamedChoice:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str):
        raise ValueError(_FORMS)
    if kind not in ("function", "custom"):
        namespace = value.get("name") if kind == "namespace" else None
        return NamedChoice(name=None, kind=kind, namespace=namespace if isinstance(namespace, str) else None)
    named = value.get(kind, value)
    if not isinstance(named, dict) or not isinstance(named.get("name"), str):
        raise ValueError(_FORMS)
    return NamedChoice(name=named["name"], kind=kind)


ToolChoice = Annotated[
    Any,
    BeforeValidator(
        _check_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | dict[str, Any] | None
    ),
]


@dataclass(frozen=True)
class Choice:
    """What a request lets the model call."""

    mode: Literal["none", "auto", "required"] = "auto"
    named_tool: str | None = None  # the one that must be called, by the model's name
    offers: Sequence[Offer] = ()

    def conversation(self) -> dict[str, Any]:
        """The fields of a Conversation for this choice."""
        named = {} if self.named_tool is None else {"named_tool": self.named_tool}
        return {
            "tools": [offer.tool for offer in self.offers],
            "tools_for_template": [offer.for_template() for offer in self.offers],
            "tool_choice": self.mode,
            **named,
        }


def choose(choice: object, toolbox: Toolbox) -> Choice:
    """What a tool_choice lets the model call. Raises RequestError for one that names an unknown tool.

    Tools that are not allowed are not shown to the model either.
    """
    if isinstance(choice, NamedChoice):
        named = choice.find(toolbox)
        _check_grammars([named], is_forced=True)
        return Choice("required", named.tool.name, toolbox.offers)
    mode, offers = choice or "auto", toolbox.offers
    if isinstance(choice, AllowedChoice):
        mode = choice.mode
        offers = [offer for tool in choice.tools for offer in tool.allowed(toolbox)]
    if mode == "required" and not offers:
        but = f" that this server can offer a model, only {', '.join(toolbox.left_out)}" if toolbox.left_out else ""
        raise RequestError(f"tool_choice is 'required', but there are no tools{but}: send some", param="tool_choice")
    if mode != "none":
        _check_grammars(offers, is_forced=mode == "required")
    return Choice(mode, None, offers)  # type: ignore[arg-type]


def _check_grammars(offers: Sequence[Offer], *, is_forced: bool) -> None:
    """Refuse a grammar that cannot be enforced if the output must be a call; otherwise the model is only shown it."""
    for offer in offers:
        if offer.fault is None:
            continue
        if is_forced:
            param = offer.tool.param
            raise RequestError(
                f"{param}: the grammar cannot be enforced: {offer.fault}. Change it, or send tool_choice 'auto', with "
                "which the model is only shown it",
                param=param,
            )
        warn_once("the grammar of the custom tool %s is shown to the model, but cannot be enforced", offer.name)


def shown_choice(choice: object) -> object:
    """A tool_choice as responses show it."""
    if isinstance(choice, NamedChoice):
        name = choice.name or choice.namespace
        return {"type": choice.kind} | ({} if name is None else {"name": name})
    if isinstance(choice, AllowedChoice):
        return {"type": "allowed_tools", "mode": choice.mode, "tools": list(map(shown_choice, choice.tools))}
    return choice or "auto"
