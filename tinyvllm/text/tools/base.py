"""Tools, and the interface of a tool call format."""

from __future__ import annotations

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinyvllm.text.grammar import lark_json, lark_string
from tinyvllm.text.messages import as_object, with_parsed_arguments, with_result_names
from tinyvllm.text.tools.events import ToolParser

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None  # a JSON schema; None: no parameters
    is_strict: bool = False  # enforce the schema even if the model chooses whether to call
    param: str = "tools"  # path of the schema in the request, for messages
    hides_pattern: bool = False  # the schema has a pattern that the description says better

    @property
    def shown_parameters(self) -> Mapping[str, Any]:
        """The schema as the model is shown it."""
        schema = self.parameters or {"type": "object", "properties": {}}
        if not self.hides_pattern:
            return schema
        properties = {
            name: {key: value for key, value in inner.items() if key != "pattern"}
            for name, inner in schema["properties"].items()
        }
        return {**schema, "properties": properties}

    def rule(self, *, is_enforced: bool = True) -> str:
        """The body of a Lark rule for the arguments. Raises RequestError if the schema cannot be enforced."""
        nothing = {"type": "object", "properties": {}, "additionalProperties": False}
        schema = self.parameters or nothing
        return lark_json(schema if is_enforced else {"type": "object"}, self.param)


_ID_CHARACTERS = string.ascii_letters + string.digits


class ToolFormat(ABC):
    """How a family of models writes tool calls. Each module in FAMILIES defines one, called FORMAT."""

    marks: tuple[str, ...]  # texts by which the family's chat templates are recognized
    special_texts: tuple[str, ...] = ()  # marks around calls that are special tokens in some vocabularies
    id_prefix = "call_"
    id_length = 24

    def is_named_in(self, template_source: str) -> bool:
        return any(mark in template_source for mark in self.marks)

    def make_id(self) -> str:
        return self.id_prefix + "".join(secrets.choice(_ID_CHARACTERS) for _ in range(self.id_length))

    def shows_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """Whether special tokens must be kept in the output's text, because the marks of calls are among them."""
        return any(special_id(tokenizer, text) is not None for text in self.special_texts)

    @abstractmethod
    def parser(self, tools: Mapping[str, Tool]) -> ToolParser:
        """A parser for one message. tools: those available, by name."""

    @abstractmethod
    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        """A Lark grammar of one call, or of one or more if is_parallel. Raises RequestError for a schema."""

    @abstractmethod
    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        """A Lark grammar of text or calls, at the model's choice, which enforces the schemas of strict tools."""

    @abstractmethod
    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls, each {"name": ..., "arguments": {...}}, in the model's format."""

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], *, has_template: bool
    ) -> list[Mapping[str, Any]]:
        """The messages for the chat template.

        has_template: the template itself formats tools, calls and results. Otherwise they are converted to text here.
        """
        if has_template:
            return list(messages)
        written = [self.as_text(message) for message in with_result_names(messages)]
        if not tools:
            return written
        instructions = self._describe(tools)
        if written and written[0]["role"] == "system":
            content = written[0].get("content")
            instructions = f"{content}\n\n{instructions}" if content else instructions
            return [{**written[0], "content": instructions}, *written[1:]]
        return [{"role": "system", "content": instructions}, *written]

    def _describe(self, tools: Sequence[Tool]) -> str:
        example = self.write([{"name": "function name", "arguments": {"argument": "value"}}])
        functions = (
            {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.shown_parameters if tool.parameters else {},
            }
            for tool in tools
        )
        lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
        return f"You can call functions. To call one, answer with nothing but:\n{example}\nThe functions:\n{lines}"

    def as_text(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A call in the model's format; a result as a message of the user."""
        if message["role"] == "tool":
            of = message.get("name") or message.get("tool_call_id")
            content = message.get("content", "")
            return {"role": "user", "content": f"Result of the call{f' {of}' if of else ''}: {content}"}
        calls = message.get("tool_calls")
        if not calls:
            return message
        functions = [with_parsed_arguments(call).get("function", {}) for call in calls]
        text = self.write([{"name": f.get("name"), "arguments": as_object(f.get("arguments", {}))} for f in functions])
        content = message.get("content")
        kept = {name: value for name, value in message.items() if name != "tool_calls"}
        return {**kept, "content": f"{content}\n{text}" if content else text}


def special_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the special token with this text, if there is one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] in tokenizer.special_ids else None


def mark(tokenizer: Tokenizer, text: str) -> str:
    """A mark in Lark: a literal, or the id of a special token, which a literal cannot match."""
    token_id = special_id(tokenizer, text)
    return lark_string(text) if token_id is None else f"<[{token_id}]>"


def marked_head(begin: str) -> str:
    """The rule `head`: a text and the mark that ends it. A literal ends it at its first occurrence; a special token
    cannot occur inside text at all."""
    return f"head: TEXT {begin}\n" if begin.startswith("<[") else f"head[lazy]: TEXT {begin}\n"


TEXT_RULE = "TEXT: /(.|\\n)*/\n"


def call_rules(tools: Sequence[Tool], arguments_key: str, *, all_strict: bool = True) -> str:
    """The Lark rule `call` of one call's object. The name comes first, so it can be reported before the arguments."""

    def head(tool: Tool) -> str:
        return lark_string(f'{{"name": {json.dumps(tool.name)}, "{arguments_key}": ')

    return named_call_rules(tools, head, lark_string("}"), all_strict=all_strict)


def named_call_rules(
    tools: Sequence[Tool], head: Callable[[Tool], str], tail: str = "", *, all_strict: bool = True
) -> str:
    """The Lark rule `call`: a tool's `head`, its arguments as a JSON object, and `tail`."""
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        rules.append(f"call_{index}: {head(tool)} args_{index} {tail}".rstrip())
        rules.append(f"args_{index}: {tool.rule(is_enforced=all_strict or tool.is_strict)}")
    return "\n".join(rules) + "\n"
