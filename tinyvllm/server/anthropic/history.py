"""Converts Anthropic's messages to the canonical ones of `Conversation`.

The rules, block by block:

- `text` is kept. The texts of one message are joined by newlines.
- `thinking` becomes the message's reasoning, with any signature; if it is empty, the text that the signature carries
  does. `redacted_thinking` is skipped, since only its author can read it.
- `tool_use` becomes a tool call, `tool_result` a message of the role `tool`. The results of a message come before its
  text, as Anthropic requires. A result with `is_error` begins with "Error: ", because templates have no field for it.
- `search_result`, and documents of plain text, become text. `compaction` is text: a summary of what came before.
- Images, and documents in other forms, are refused: the models here read text. In a tool result they are replaced by a
  note to the model, because the client cannot take back a call that has been made.
- `tool_reference` in a result, and `tool_addition` in a system message, become a description of the tool, if the prompt
  does not begin with it; `tool_removal` becomes a sentence. A system message with `clear_at` is left out once a user
  message follows it.
- Uses and results of server tools (web search, code execution, MCP) are skipped and logged: their results are encrypted
  for the service that made them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.errors import RequestError
from tinyvllm.server.anthropic.blocks import Block, document_text, source_of, string_of, text_of
from tinyvllm.server.anthropic.signatures import carried_text
from tinyvllm.server.notices import warn_once

if TYPE_CHECKING:
    from tinyvllm.server.anthropic.protocol import Message

Canonical = dict[str, Any]

# Claude Code's system prompt begins with a line for Anthropic's accounting. It differs from request to request, so a
# prefix cache would never find the prompt again: https://github.com/vllm-project/vllm/pull/36829
_PSEUDO_HEADER = re.compile(r"\A\s*x-anthropic-[\w-]+:[^\n]*\n*")

_SERVER_BLOCK = re.compile(r"(server|mcp)_tool_use|(?!tool_result$).*tool_result|container_upload|mcp_tool_listing")


def canonical_messages(
    system: str | Sequence[Block] | None, messages: Sequence[Message], describe: Callable[[str], str]
) -> list[Canonical]:
    """Raises RequestError, naming the block, for content that cannot be rendered.

    describe: what the model is told about the tool of that name where a message makes it available.
    """
    reader = _Reader(describe)
    found = list(reader.system_message(system, "system"))
    users = [position for position, message in enumerate(messages) if message.role == "user"]
    for position, message in enumerate(messages):
        is_over = message.clear_at == "next_user_message" and bool(users) and users[-1] > position
        if not is_over:
            found += reader.read(message, f"messages.{position}")
    return found


def inline_definition(block: Block) -> Mapping[str, Any] | None:
    """The definition of the tool that a `tool_addition` block adds by value."""
    tool = block.get("tool") if block["type"] == "tool_addition" else None
    definition = tool.get("definition") if isinstance(tool, dict) else None
    return definition if isinstance(definition, dict) else None


class _Reader:
    """Converts messages one by one."""

    def __init__(self, describe: Callable[[str], str]) -> None:
        self._describe = describe

    def read(self, message: Message, param: str) -> Iterator[Canonical]:
        content, here = message.content, f"{param}.content"
        if message.role == "system":
            yield from self.system_message(content, here)
        elif content is None:
            raise RequestError(f"{here} is required and missing", param=here)
        elif isinstance(content, str):
            yield {"role": message.role, "content": content}
        elif message.role == "user":
            yield from self._user_messages(content, here)
        else:
            yield _assistant_message(content, here)

    def system_message(self, content: str | Sequence[Block] | None, param: str) -> Iterator[Canonical]:
        """One message, or none if nothing but pseudo-headers was there."""
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        texts = (self._system_text(block, f"{param}.{n}") for n, block in enumerate(blocks))
        text = "\n".join(filter(None, texts))
        if text:
            yield {"role": "system", "content": text}

    def _system_text(self, block: Block, param: str) -> str:
        if block["type"] not in ("tool_addition", "tool_removal"):
            return _PSEUDO_HEADER.sub("", text_of(block, param))
        tool = inline_definition(block) or block.get("tool")
        name = tool.get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str):  # a set of MCP tools, which only their server could name
            return ""
        return self._describe(name) if block["type"] == "tool_addition" else f"The tool {name} is no longer available."

    def _user_messages(self, blocks: Sequence[Block], param: str) -> Iterator[Canonical]:
        texts: list[str] = []
        for position, block in enumerate(blocks):
            here = f"{param}.{position}"
            if block["type"] == "tool_result":
                yield self._tool_message(block, here)
            elif not _is_skipped(block):
                texts.append(text_of(block, here))
        if texts or not any(block["type"] == "tool_result" for block in blocks):
            yield {"role": "user", "content": "\n".join(filter(None, texts))}

    def _tool_message(self, block: Block, param: str) -> Canonical:
        content = block.get("content")
        if content is None:
            content = ""
        elif isinstance(content, list):
            texts = [self._result_text(part, f"{param}.content.{n}") for n, part in enumerate(content)]
            content = "\n".join(filter(None, texts))
        elif not isinstance(content, str):
            raise RequestError(f"{param}.content is not a string or a list of blocks", param=f"{param}.content")
        if block.get("is_error") is True and not content.lower().startswith("error"):
            content = f"Error: {content}" if content else "Error"
        return {"role": "tool", "tool_call_id": string_of(block, "tool_use_id", param), "content": content}

    def _result_text(self, block: Any, param: str) -> str:
        if not isinstance(block, dict):
            raise RequestError(f"{param} is not a content block", param=param)
        match block.get("type"):
            case "tool_reference":
                return self._describe(string_of(block, "tool_name", param))
            case "text" | "search_result":
                return text_of(block, param)
            case "document" if (text := document_text(block, param)) is not None:
                return text
            case kind:
                warn_once("a tool's result contains %s, which the model does not see", str(kind))
                source = source_of(block)
                form = source.get("media_type") or source.get("type")
                shown = f"{kind} ({form})" if form else kind
                return f"[{shown} left out: this model reads text only]"


def _assistant_message(blocks: Sequence[Block], param: str) -> Canonical:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Canonical] = []
    for position, block in enumerate(blocks):
        here = f"{param}.{position}"
        match block["type"]:
            case "thinking":
                thoughts.append(string_of(block, "thinking", here) or carried_text(block.get("signature")))
            case "tool_use":
                calls.append(_call(block, here))
            case _ if not _is_skipped(block):
                texts.append(text_of(block, here))
    message: Canonical = {"role": "assistant", "content": "\n".join(filter(None, texts))}
    if any(thoughts):
        message["reasoning_content"] = "\n".join(filter(None, thoughts))
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Block, param: str) -> Canonical:
    arguments = block.get("input", {})
    if not isinstance(arguments, dict):
        raise RequestError(f"{param}.input is not an object: give the tool's input", param=f"{param}.input")
    function = {"name": string_of(block, "name", param), "arguments": arguments}
    return {"id": string_of(block, "id", param), "type": "function", "function": function}


def _is_skipped(block: Block) -> bool:
    """Whether the block means nothing to this model."""
    kind: str = block["type"]
    if kind in ("redacted_thinking", "thinking", "fallback"):
        return True
    if _SERVER_BLOCK.fullmatch(kind) is None:
        return False
    warn_once("content blocks of type %s belong to another server and are skipped", kind)
    return True
