"""For models that were taught no format: tools are described in the system message, and a call is a JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.text.tools.base import Tool, ToolFormat, ToolParser, call_rules
from tinyvllm.text.tools.llama3 import BareParser

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer

_INSTRUCTIONS = (
    "You can call functions. To call one, answer with nothing but a JSON object such as "
    '{{"name": "function name", "arguments": {{"argument": "value"}}}}. The functions, a line each:\n{lines}'
)


class GenericFormat(ToolFormat):
    name = "json"
    marks = ()

    def is_named_in(self, template_source: str) -> bool:
        return True

    def parser(self, names: frozenset[str]) -> ToolParser:
        return BareParser(names)

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        # one call is an object, several are a list of them
        several = ' | "[" call (", " call)+ "]"' if is_parallel else ""
        return f"start: call{several}\n{call_rules(tools, 'arguments')}"

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], *, has_template: bool
    ) -> list[Mapping[str, Any]]:
        """Tools, calls and results as text, for a template that would leave them out."""
        if has_template:
            return list(messages)
        written = [_as_text(message) for message in messages]
        if not tools:
            return written
        lines = "\n".join(
            json.dumps({"name": tool.name, "description": tool.description, "parameters": tool.parameters or {}})
            for tool in tools
        )
        instructions = _INSTRUCTIONS.format(lines=lines)
        if written and written[0]["role"] == "system":
            content = written[0].get("content")
            instructions = f"{content}\n\n{instructions}" if content else instructions
            return [{**written[0], "content": instructions}, *written[1:]]
        return [{"role": "system", "content": instructions}, *written]


def _as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call as the model would write it, a result as words of the user."""
    if message["role"] == "tool":
        of = message.get("name") or message.get("tool_call_id")
        return {"role": "user", "content": f"Result of the call{f' {of}' if of else ''}: {message.get('content', '')}"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [call.get("function", {}) for call in calls]
    written = [{"name": f.get("name"), "arguments": f.get("arguments", {})} for f in functions]
    text = json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False)
    content = message.get("content")
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": f"{content}\n{text}" if content else text}
