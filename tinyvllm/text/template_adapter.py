"""Rewrites a conversation into one that a chat template can take, according to what `template_probes` found out.

Whatever the template renders unchanged is left alone. What is rewritten keeps its place, so that from turn to turn a
prompt grows only at its end and the prefix cache finds the beginning again. docs/OUTPUT.md has the rules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinyvllm.errors import RequestError
from tinyvllm.text.messages import as_object, calls_of, with_parsed_arguments, with_result_names
from tinyvllm.text.template_abilities import REASONING_FIELDS, Abilities, Message, thinking_part

SEPARATOR = "\n\n"  # between messages that become one
SHORT_ID_LENGTH = 9


def adapt(
    messages: Sequence[Mapping[str, Any]],
    abilities: Abilities,
    as_text: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> tuple[list[Message], list[str]]:
    """The messages for the template, and the changes, a sentence for each kind.

    as_text: writes a message's calls or result into its content. Raises RequestError for content that is not text.
    """
    adapter = Adapter(abilities, as_text)
    return adapter.adapt(messages), list(dict.fromkeys(adapter.changes))


class Adapter:
    """Rewrites one conversation. Owns the list of changes."""

    def __init__(self, abilities: Abilities, as_text: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        self.abilities = abilities
        self.changes: list[str] = []
        self._as_text = as_text

    def adapt(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        found = [flatten_content(message, index) for index, message in enumerate(messages)]
        if not self.abilities.is_known:
            return found
        found = [self._with_role_and_reasoning(message) for message in found]
        systems, others = self._split_systems(self._with_tools(found))
        others = self._with_turns(others)
        systems, others = self._with_systems(systems, others)
        if others and self._misses_user(others):
            self.changes.append("a user message is put before the assistant's")
            others = [{"role": "user", "content": "" if self.abilities.empty_users else "."}, *others]
        found = [*systems, *others]
        return [self._with_form(message) for message in found]

    def _with_role_and_reasoning(self, message: Message) -> Message:
        """Rename `developer` to `system`, and reasoning to the template's name for it."""
        if message.get("role") == "developer":
            message["role"] = "system"
        thoughts = [message.pop(name) for name in REASONING_FIELDS if name in message]
        thought = next(filter(None, thoughts), None)
        if thought:  # even if no probe rendered it: a variable may decide
            name = self.abilities.reasoning_field
            message[name if name in REASONING_FIELDS else REASONING_FIELDS[0]] = thought
        return message

    # ---- Tools ----

    def _with_tools(self, messages: Sequence[Message]) -> list[Message]:
        abilities = self.abilities
        named, alone = with_result_names(messages), unmatched(messages)
        messages = [
            dict(self._as_text(named[index])) if self._must_be_text(message, is_alone=index in alone) else message
            for index, message in enumerate(messages)
        ]
        if not abilities.calls:
            return messages
        if abilities.short_ids or abilities.needs_ids:
            messages = with_ids(messages, is_short=abilities.short_ids)
        if abilities.needs_result_names:
            messages = [dict(message) for message in with_result_names(messages)]
        if not abilities.parallel_calls and any(len(calls_of(message)) > 1 for message in messages):
            self.changes.append("parallel calls become a message each")
            messages = separate_calls(messages)
        return [self._with_arguments(message) if calls_of(message) else message for message in messages]

    def _must_be_text(self, message: Message, *, is_alone: bool) -> bool:
        """Whether its calls or result become text of its content. is_alone: calls without a result, or the reverse."""
        abilities = self.abilities
        if calls_of(message) and not (abilities.calls and (abilities.unanswered_calls or not is_alone)):
            self.changes.append("tool calls are written as text")
            return True
        if message.get("role") == "tool" and not (abilities.results and (abilities.orphan_results or not is_alone)):
            self.changes.append("tool results are written as text of the user")
            return True
        return False

    def _with_arguments(self, message: Message) -> Message:
        """The message with the arguments of its calls in the template's form."""
        calls = []
        for call in map(with_parsed_arguments, calls_of(message)):
            given = call["function"]["arguments"]
            if self.abilities.arguments == "text":
                given = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            elif not self.abilities.malformed_arguments:
                given = as_object(given)
            calls.append({**call, "function": {**call["function"], "arguments": given}})
        return {**message, "tool_calls": calls}

    # ---- System messages ----

    def _split_systems(self, messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
        """System messages at the beginning, and the others. If no later ones are taken, these are the user's."""
        count = next((n for n, message in enumerate(messages) if message.get("role") != "system"), len(messages))
        systems, others = list(messages[:count]), list(messages[count:])
        if not self.abilities.later_systems and any(message.get("role") == "system" for message in others):
            self.changes.append("system messages after others become the user's")
            others = [{**one, "role": "user"} if one.get("role") == "system" else one for one in others]
        return systems, others

    def _with_systems(self, systems: list[Message], others: list[Message]) -> tuple[list[Message], list[Message]]:
        if systems and not self._takes_system_before(others):
            self.changes.append("the system message becomes part of the user's")
            return [], self._folded(join(systems)["content"], others)
        if len(systems) > 1 and not self.abilities.several_systems:
            self.changes.append("system messages are joined")
            systems = [join(systems)]
        return systems, others

    def _misses_user(self, others: Sequence[Message]) -> bool:
        if others[0].get("role") == "assistant" and not self.abilities.assistant_first:
            return True
        return self.abilities.needs_user and all(message.get("role") != "user" for message in others)

    def _takes_system_before(self, others: Sequence[Message]) -> bool:
        abilities = self.abilities
        if abilities.system == "no":
            return False
        if abilities.needs_user and not any(message.get("role") == "user" for message in others):
            return False
        return not abilities.system_needs_last_user or not others or others[-1].get("role") == "user"

    def _folded(self, system: str, others: list[Message]) -> list[Message]:
        """Put the system text at the beginning of the user message into which the template would put it."""
        users = [index for index, message in enumerate(others) if message.get("role") == "user"]
        if self.abilities.system == "last user" and users:
            index = users[-1]
        elif users[:1] == [0]:
            index = 0
        else:
            return [{"role": "user", "content": system}, *others]
        user = others[index]
        others[index] = {**user, "content": join([{"content": system}, user])["content"]}
        return others

    # ---- Turns ----

    def _with_turns(self, messages: Sequence[Message]) -> list[Message]:
        found: list[Message] = []
        for message in messages:
            if found and self._is_droppable(message):
                self.changes.append("empty messages are left out")
            elif found and self._must_join(found[-1], message):
                self.changes.append(f"consecutive messages are joined: {found[-1]['role']} and {message['role']}")
                found[-1] = join([found[-1], message])
            else:
                found.append(message)
        return found

    def _is_droppable(self, message: Message) -> bool:
        allowed = {"user": self.abilities.empty_users, "assistant": self.abilities.empty_assistants}
        has_thought = self.abilities.reasoning_field == "content" and bool(message.get(REASONING_FIELDS[0]))
        is_empty = not message["content"] and not calls_of(message) and not has_thought
        return is_empty and not allowed.get(message.get("role", ""), True)

    def _must_join(self, first: Message, second: Message) -> bool:
        roles = (str(first.get("role")), str(second.get("role")))
        if roles == ("assistant", "assistant"):
            return self._must_join_answers(first, second)
        allowed = {
            ("user", "user"): self.abilities.consecutive_users,
            ("tool", "user"): self.abilities.user_after_result,
        }
        return not allowed.get(roles, True)

    def _must_join_answers(self, first: Message, second: Message) -> bool:
        abilities = self.abilities
        if not calls_of(first):
            return not (abilities.answer_before_calls if calls_of(second) else abilities.consecutive_assistants)
        # unless the results are with them, as Gemma 4's
        return bool(calls_of(second)) and not (abilities.consecutive_calls or first.get("tool_responses"))

    # ---- The form of content ----

    def _with_form(self, message: Message) -> Message:
        if calls_of(message) and message["content"]:
            message = self._with_text_beside_calls(message)
        content = message["content"]
        if self.abilities.reasoning_field == "content" and message.get(REASONING_FIELDS[0]):
            thought = thinking_part(message.pop(REASONING_FIELDS[0]))
            return {**message, "content": [thought, *([{"type": "text", "text": content}] if content else [])]}
        if self.abilities.call_content == "null" and calls_of(message) and not content:
            return {**message, "content": None}
        if message.get("role") in self.abilities.part_roles:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _with_text_beside_calls(self, message: Message) -> Message:
        match self.abilities.text_with_calls:
            case "content":
                return message
            case "tool_plan":
                return {"tool_plan": message["content"], **message, "content": ""}
        self.changes.append("text beside tool calls is left out")
        return {**message, "content": ""}


def flatten_content(message: Mapping[str, Any], index: int) -> Message:
    """The message with its content as one string: text parts are joined by newlines, as in vLLM; no content is ""."""
    content = message.get("content")
    if content is None:
        return {**message, "content": ""}
    if isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence):
        what = f"messages[{index}].content is a {type(content).__name__}"
        raise RequestError(f"{what}: send a string or a list of text parts", param="messages")
    texts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (type(part).__name__, None)
        if kind != "text" or not isinstance(text, str):
            what = f"messages[{index}].content has a part of type {kind!r}"
            raise RequestError(f"{what}: this model accepts text parts only", param="messages")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def join(messages: Sequence[Message]) -> Message:
    """One message with the first one's role, and the content, reasoning and calls of all."""
    joined = {**messages[-1], **messages[0]}
    for name in ("content", *REASONING_FIELDS):
        if name in joined:
            joined[name] = SEPARATOR.join(filter(None, (message.get(name) for message in messages)))
    calls = [call for message in messages for call in calls_of(message)]
    return {**joined, "tool_calls": calls} if calls else joined


# ---- Calls and their results -----------------------------------------------------------------------------------------


def unmatched(messages: Sequence[Message]) -> set[int]:
    """Indices of calls that no result follows before another kind of message, and of results without calls."""
    found: set[int] = set()
    unanswered: list[int] = []
    may_be_answered = False
    for index, message in enumerate(messages):
        if calls_of(message):
            unanswered.append(index)
            may_be_answered = True
        elif message.get("role") == "tool":
            unanswered.clear()
            if not may_be_answered:
                found.add(index)
        else:
            found.update(unanswered)
            unanswered.clear()
            may_be_answered = False
    return found


def with_ids(messages: Sequence[Message], *, is_short: bool) -> list[Message]:
    """Calls and results with ids. Calls without one are numbered; results without one answer the calls in order.
    is_short: an id of another form becomes 9 letters and digits that depend only on it."""
    found: list[Message] = []
    num_made, open_ids = 0, list[str]()
    for message in messages:
        message = dict(message)
        if calls_of(message):
            calls = []
            for call in calls_of(message):
                call_id = call.get("id")
                if not call_id:
                    call_id, num_made = f"call{num_made:05}", num_made + 1
                calls.append({**call, "id": short_id(call_id) if is_short else call_id})
            open_ids = [call["id"] for call in calls]
            message["tool_calls"] = calls
        elif message.get("role") == "tool":
            given = message.get("tool_call_id")
            if given and is_short:
                given = short_id(given)
            message["tool_call_id"] = given or (open_ids[0] if open_ids else short_id(""))
            open_ids = [one for one in open_ids if one != message["tool_call_id"]]
        found.append(message)
    return found


def short_id(call_id: str) -> str:
    is_short = len(call_id) == SHORT_ID_LENGTH and call_id.isascii() and call_id.isalnum()
    return call_id if is_short else hashlib.sha256(call_id.encode()).hexdigest()[:SHORT_ID_LENGTH]


def separate_calls(messages: Sequence[Message]) -> list[Message]:
    """Each call as a message of its own, followed by its result. Text and reasoning stay with the first."""
    found: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        calls, results = calls_of(message), []
        if len(calls) < 2:
            found.append(message)
            continue
        while position < len(messages) and messages[position].get("role") == "tool":
            results.append(messages[position])
            position += 1
        for index, call in enumerate(calls):
            said = message if index == 0 else {"role": "assistant", "content": ""}
            found.append({**said, "tool_calls": [call]})
            found += [one for one in results if owner_of(one, calls) == index]
    return found


def owner_of(result: Message, calls: Sequence[Mapping[str, Any]]) -> int:
    """The index of the call that it answers, or of the last one if its id is unknown."""
    ids = [call.get("id") for call in calls]
    call_id = result.get("tool_call_id")
    return ids.index(call_id) if call_id in ids else len(calls) - 1
