"""Prompts that end inside the last message, so that the model continues it.

The end of the message is found by a mark: text appended to its content, at which the rendered prompt is cut. Searching
for the content itself would also find it in what the template writes after it: "i" in "<|im_end|>".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.errors import RequestError

if TYPE_CHECKING:
    from tinyvllm.text.chat import ChatTemplate

# The space tells templates that strip content: then it is gone, and so is what the model would have to continue after.
MARK = "Continues-here-7413"
MARKED_END = MARK + " "
PARAM = "continue_final_message"


def render_continued(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The chat as text up to the end of the last message's content. Raises RequestError if that is impossible."""
    return cut_at_mark(template.render(mark_end(messages), add_generation_prompt=False, **variables), messages)


def mark_end(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with a mark at the end of the last one. Raises RequestError if it cannot be continued."""
    *before, last = messages
    content = last.get("content")
    if last.get("tool_calls"):
        raise RequestError(
            f"{PARAM}: the last message has tool_calls, after which nothing can be continued", param=PARAM
        )
    if isinstance(content, str) and (content or last.get("role") == "assistant"):
        return [*before, {**last, "content": content + MARKED_END}]
    parts = list(content) if isinstance(content, Sequence) and not isinstance(content, str) else []
    if parts and isinstance(parts[-1], Mapping) and isinstance(parts[-1].get("text"), str):
        parts[-1] = {**parts[-1], "text": parts[-1]["text"] + MARKED_END}
        return [*before, {**last, "content": parts}]
    raise RequestError(f"{PARAM} needs a last message with text in its content", param=PARAM)


def cut_at_mark(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt up to the mark. `messages`: without the mark. Raises RequestError if the template has dropped it."""
    end = text.rfind(MARK)
    if end < 0:
        raise RequestError(
            f"{PARAM}: the model's chat template does not render the content of a last message of the role "
            f"{messages[-1].get('role')!r}: send it without {PARAM}",
            param=PARAM,
        )
    if text.startswith(MARKED_END, end):
        return text[:end]
    # the template strips content; the mark has kept it from stripping the blanks before it
    content = messages[-1]["content"]
    content = content if isinstance(content, str) else content[-1]["text"]
    return text[:end].rstrip() if content.strip() else text[:end]
