"""From Anthropic's messages to the canonical ones of `Conversation`.

The rules, block by block:

- `text` is kept. The texts of one message are joined by newlines.
- `thinking` becomes the message's reasoning, whatever its signature, or the text that the signature carries;
  `redacted_thinking` is skipped, since only its author can read it.
- `tool_use` becomes a tool call, `tool_result` a message of the role `tool`. The results of a message come before its
  text, as Anthropic requires. A result with `is_error` begins with "Error: ", because templates have no field for it.
- `search_result`, and documents of plain text, become text. `compaction` is text: a summary of what came before.
- Images, and documents in other forms, are refused: the models here read text. Within a tool's result they are replaced
  by a note to the model, because the client cannot take back a call that has been made.
- Uses and results of tools that a server runs (web search, code execution, MCP) are skipped and logged: their results
  are encrypted for the service that made them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.errors import RequestError
from tinyvllm.server.anthropic.signatures import carried_text
from tinyvllm.server.notices import warn_once

if TYPE_CHECKING:
    from tinyvllm.server.anthropic.protocol import Block, Message

Canonical = dict[str, Any]

# Claude Code's system prompt begins with a line for the accounting of Anthropic's service. It differs from request to
# request, so a prefix cache would never find the prompt again: https://github.com/vllm-project/vllm/pull/36829
_PSEUDO_HEADER = re.compile(r"\s*x-anthropic-[\w-]+:[^\n]*\n*")

_SERVER_BLOCK = re.compile(r"(server|mcp)_tool_use|(?!tool_result$).*tool_result|container_upload")


def canonical_messages(system: str | Sequence[Block] | None, messages: Sequence[Message]) -> list[Canonical]:
    """Raises RequestError, naming the block, for content that cannot be rendered."""
    found = list(_system_message(system, "system"))
    for position, message in enumerate(messages):
        found += _read(message, f"messages.{position}")
    return found


def _read(message: Message, param: str) -> Iterator[Canonical]:
    content = message.content
    if message.role == "system":
        yield from _system_message(content, f"{param}.content")
    elif isinstance(content, str):
        yield {"role": message.role, "content": content}
    elif message.role == "user":
        yield from _user_messages(content, f"{param}.content")
    else:
        yield _assistant_message(content, f"{param}.content")


def _system_message(content: str | Sequence[Block] | None, param: str) -> Iterator[Canonical]:
    """One message, unless nothing is left without the pseudo-headers."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    texts = (_PSEUDO_HEADER.sub("", _text_of(block, f"{param}.{n}"), count=1) for n, block in enumerate(blocks))
    text = "\n".join(filter(None, texts))
    if text:
        yield {"role": "system", "content": text}


def _user_messages(blocks: Sequence[Block], param: str) -> Iterator[Canonical]:
    texts: list[str] = []
    for position, block in enumerate(blocks):
        here = f"{param}.{position}"
        if block["type"] == "tool_result":
            yield _tool_message(block, here)
        elif not _is_skipped(block):
            texts.append(_text_of(block, here))
    if texts or not any(block["type"] == "tool_result" for block in blocks):
        yield {"role": "user", "content": "\n".join(filter(None, texts))}


def _assistant_message(blocks: Sequence[Block], param: str) -> Canonical:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Canonical] = []
    for position, block in enumerate(blocks):
        here = f"{param}.{position}"
        match block["type"]:
            case "thinking":
                thoughts.append(_string(block, "thinking", here) or carried_text(block.get("signature")))
            case "tool_use":
                calls.append(_call(block, here))
            case _ if not _is_skipped(block):
                texts.append(_text_of(block, here))
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
    function = {"name": _string(block, "name", param), "arguments": arguments}
    return {"id": _string(block, "id", param), "type": "function", "function": function}


def _tool_message(block: Block, param: str) -> Canonical:
    content = block.get("content")
    if content is None:
        content = ""
    elif isinstance(content, list):
        texts = [_result_text(part, f"{param}.content.{n}") for n, part in enumerate(content)]
        content = "\n".join(filter(None, texts))
    elif not isinstance(content, str):
        raise RequestError(f"{param}.content is not a string or a list of blocks", param=f"{param}.content")
    if block.get("is_error") is True and not content.lower().startswith("error"):
        content = f"Error: {content}" if content else "Error"
    return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", param), "content": content}


def _result_text(block: Any, param: str) -> str:
    if not isinstance(block, dict):
        raise RequestError(f"{param} is not a content block", param=param)
    match block.get("type"):
        case "tool_reference":
            return f"The tool {block.get('tool_name')} is available."
        case "image" | "document" if _document_text(block, param) is None:
            kind = _source_of(block).get("media_type") or _source_of(block).get("type") or "no source"
            warn_once("a tool's result contains %s, which the model does not see", str(block["type"]))
            return f"[{block['type']} ({kind}) left out: this model reads text only]"
        case _:
            return _text_of(block, param)


def _text_of(block: Block, param: str) -> str:
    match block.get("type"):
        case "text":
            return _string(block, "text", param)
        case "search_result":
            parts = block.get("content")
            texts = [_text_of(part, f"{param}.content.{n}") for n, part in enumerate(_list(parts, f"{param}.content"))]
            return "\n".join([f"{block.get('title')} ({block.get('source')})", *texts])
        case "document":
            text = _document_text(block, param)
            if text is not None:
                return text
            raise _unreadable(block, "a document", param)
        case "compaction":
            return block["content"] if isinstance(block.get("content"), str) else ""
        case "image":
            raise _unreadable(block, "an image", param)
        case kind:
            raise RequestError(f"{param} is of type {kind!a:.60}, which this server does not read", param=param)


def _document_text(block: Block, param: str) -> str | None:
    """The document's title, context and text; None if it has no text that can be read."""
    source = _source_of(block)
    match source.get("type"):
        case "text":
            text = _string(source, "data", f"{param}.source")
        case "content":
            content = source.get("content")
            here = f"{param}.source.content"
            parts = [content] if isinstance(content, str) else _list(content, here)
            text = "\n".join(p if isinstance(p, str) else _text_of(p, f"{here}.{n}") for n, p in enumerate(parts))
        case _:
            return None
    heads = [block.get(name) for name in ("title", "context")]
    return "\n".join([*(head for head in heads if isinstance(head, str) and head), text])


def _is_skipped(block: Block) -> bool:
    """Whether the block says nothing to this model."""
    kind: str = block["type"]
    if kind in ("redacted_thinking", "thinking", "fallback"):
        return True
    if _SERVER_BLOCK.fullmatch(kind) is None:
        return False
    warn_once("content blocks of type %s belong to another server and are skipped", kind)
    return True


def _unreadable(block: Block, what: str, param: str) -> RequestError:
    kind = _source_of(block).get("type")
    shown = f"with a {kind!a:.40} source" if isinstance(kind, str) else "without a source"
    return RequestError(f"{param} is {what} {shown}, but this model reads text only: leave it out", param=param)


def _source_of(block: Block) -> Mapping[str, Any]:
    source = block.get("source")
    return source if isinstance(source, dict) else {}


def _string(block: Mapping[str, Any], name: str, param: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{param}.{name} is missing or is not a string", param=f"{param}.{name}")
    return value


def _list(value: object, param: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RequestError(f"{param} is not a list of content blocks", param=param)
    return value
