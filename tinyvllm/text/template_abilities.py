"""What a chat template can take. `template_probes` finds it out, and `template_adapter` rewrites accordingly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class Abilities:
    """What a template can take. The defaults are those of a template that takes everything."""

    is_known: bool = False  # False: the probes failed, so messages are passed as they are
    system: Literal["first", "last user", "no"] = "first"  # where a leading system message is rendered, if at all
    system_needs_last_user: bool = False  # it is dropped if the conversation ends with a result or an answer
    several_systems: bool = True  # at the beginning
    later_systems: bool = True  # after other messages
    needs_user: bool = False  # refuses conversations without a user message
    part_roles: frozenset[str] = frozenset()  # whose content must be a list of parts; otherwise it is a string
    consecutive_users: bool = True
    consecutive_assistants: bool = True
    user_after_result: bool = True
    assistant_first: bool = True
    empty_users: bool = True
    empty_assistants: bool = True
    # "content": it is a part of the content, of the type "thinking"; None: that of earlier messages is not rendered
    reasoning_field: str | None = REASONING_FIELDS[0]
    without_tools: str = "none"  # the value of `tools` if there are none: a key of WITHOUT_TOOLS
    # {"type": "function", "function": ...}, the function itself, or JSON text in the system message's `tools`
    tools: Literal["wrapped", "bare", "system", "no"] = "wrapped"
    incomplete_tools: bool = True  # functions and parameters without descriptions, functions without parameters
    any_schemas: bool = True  # parameters of several types, of any type, or by a reference
    calls: bool = True
    results: bool = True
    parallel_calls: bool = True
    arguments: Literal["object", "text"] = "object"
    consecutive_calls: bool = True  # messages with calls may follow each other, and their results later
    answer_before_calls: bool = True  # a message with text may precede one with calls
    unanswered_calls: bool = True  # a user message may follow calls
    orphan_results: bool = True  # a result need not follow calls
    malformed_arguments: bool = True  # takes text where it expects an object
    call_content: Literal["empty", "null"] = "empty"  # the content of a message that has only calls
    # where text beside calls is rendered; "hides": calls are dropped if there is text
    text_with_calls: Literal["content", "tool_plan", "no", "hides"] = "content"
    short_ids: bool = False  # ids must have 9 letters and digits
    needs_ids: bool = False
    needs_result_names: bool = False

    def deviations(self) -> list[str]:
        """What the template cannot take, and what is done about it, in a sentence each."""
        return [sentence for found, sentence in self._findings() if found]

    def _findings(self) -> Sequence[tuple[bool, str]]:
        parts = ", ".join(sorted(self.part_roles))
        return (
            (self.system == "no", "no system messages: they go into the user's first message"),
            (
                self.system != "no" and self.system_needs_last_user,
                "no system message unless the last message is the user's: it goes into the user's message",
            ),
            (self.system != "no" and not self.several_systems, "one system message only: several are joined"),
            (not self.later_systems, "no system message after others: it becomes the user's"),
            (bool(parts), f"content of {parts} as a list of parts"),
            (not self.consecutive_users, "no consecutive user messages: they are joined"),
            (not self.consecutive_assistants, "no consecutive assistant messages: they are joined"),
            (not self.user_after_result, "no user message after a tool result: the text is added to the result"),
            (not self.assistant_first, "no assistant message at the beginning: an empty user message precedes it"),
            (self.reasoning_field == "content", "reasoning of earlier messages as a part of the content"),
            (self.reasoning_field is None, "no reasoning of earlier messages: the template leaves it out"),
            (self.tools == "no", "no tools: definitions, calls and results are written as text"),
            (self.tools == "bare", "tools as bare functions"),
            (self.tools == "system", "tools as JSON text of the system message"),
            (self.tools != "no" and not self.calls, "no tool calls: they are written as text"),
            (self.tools != "no" and not self.results, "no tool results: they are written as text of the user"),
            (self.calls and not self.parallel_calls, "one call per message: parallel calls are separated"),
            (self.calls and self.arguments == "text", "arguments as JSON text"),
            (self.calls and self.text_with_calls in ("no", "hides"), "no text beside calls: it is left out"),
            (self.calls and self.text_with_calls == "tool_plan", "text beside calls as `tool_plan`"),
            (
                self.tools != "no" and not self.incomplete_tools,
                "tools with descriptions and parameters: empty ones are added",
            ),
            (self.tools != "no" and not self.any_schemas, "parameters of one type each"),
            (self.calls and not self.answer_before_calls, "no answer before calls: they become one message"),
            (self.calls and not self.consecutive_calls, "no consecutive messages with calls: they become one"),
            (self.calls and not self.unanswered_calls, "no calls without results: they are written as text"),
            (
                self.results and not self.orphan_results,
                "no results without calls: they are written as text of the user",
            ),
            (self.short_ids, "call ids of 9 letters and digits: others are replaced"),
            (self.needs_result_names, "results with the function's name"),
        )


def thinking_part(text: str) -> dict[str, Any]:
    """Reasoning as a part of the content."""
    return {"type": "thinking", "thinking": text}
