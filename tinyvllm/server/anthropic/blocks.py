"""The text of a content block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyvllm.errors import RequestError

Block = dict[str, Any]


def text_of(block: Block, param: str) -> str:
    """The block's text. Raises RequestError, naming the block, if it has none that a model could read."""
    match block.get("type"):
        case "text":
            return string_of(block, "text", param)
        case "search_result":
            parts = block.get("content")
            texts = [text_of(part, f"{param}.content.{n}") for n, part in enumerate(list_of(parts, f"{param}.content"))]
            return "\n".join([f"{block.get('title')} ({block.get('source')})", *texts])
        case "document":
            text = document_text(block, param)
            if text is not None:
                return text
            raise _unreadable(block, "a document", param)
        case "compaction":
            return block["content"] if isinstance(block.get("content"), str) else ""
        case "image":
            raise _unreadable(block, "an image", param)
        case kind:
            raise RequestError(f"{param} is of type {kind!a:.60}, which this server does not read", param=param)


def document_text(block: Block, param: str) -> str | None:
    """The document's title, context and text; None if it has no text that can be read."""
    source = source_of(block)
    match source.get("type"):
        case "text":
            text = string_of(source, "data", f"{param}.source")
        case "content":
            content = source.get("content")
            here = f"{param}.source.content"
            parts = [content] if isinstance(content, str) else list_of(content, here)
            text = "\n".join(p if isinstance(p, str) else text_of(p, f"{here}.{n}") for n, p in enumerate(parts))
        case _:
            return None
    heads = [block.get(name) for name in ("title", "context")]
    return "\n".join([*(head for head in heads if isinstance(head, str) and head), text])


def _unreadable(block: Block, what: str, param: str) -> RequestError:
    kind = source_of(block).get("type")
    shown = f"with a {kind!a:.40} source" if isinstance(kind, str) else "without a source"
    return RequestError(f"{param} is {what} {shown}, but this model reads text only: leave it out", param=param)


def source_of(block: Block) -> Mapping[str, Any]:
    """The source of an image or a document; empty if it is missing."""
    source = block.get("source")
    return source if isinstance(source, dict) else {}


def string_of(block: Mapping[str, Any], name: str, param: str) -> str:
    """A field of the block. Raises RequestError if it is not a string."""
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{param}.{name} is missing or is not a string", param=f"{param}.{name}")
    return value


def list_of(value: object, param: str) -> list[Any]:
    """`value`, which must be a list of blocks."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RequestError(f"{param} is not a list of content blocks", param=param)
    return value
