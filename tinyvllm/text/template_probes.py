"""Finds out what a chat template can take, by rendering short conversations with it.

Templates differ in nearly everything but a user's text: whether, where and how many system messages there may be, the
form of content and arguments, which roles may follow each other. They do not declare it, so each ability is found by
one or two probes: conversations with unique texts, which the template renders, drops or refuses.
docs/OUTPUT.md has the rules.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tinyvllm.text.template_abilities import EFFORTS, REASONING_FIELDS, Abilities, Message, thinking_part
from tinyvllm.text.template_limits import TemplateLimitError
from tinyvllm.text.template_tools import WITHOUT_TOOLS, bare, complete, describe_in_system, plain

logger = logging.getLogger(__name__)

# A probe's texts: words that no template contains, without anything that a template may strip, escape or split at.
SYSTEMS = ("Probesystem7413", "Probesystem8524")
USERS = ("Probeuser7413", "Probeuser8524", "Probeuser9635")
ANSWERS = ("Probeanswer7413", "Probeanswer8524")
THOUGHT = "Probethought7413"
DEFINED, DEFINED_PARAMETER, DESCRIPTION = "probe_defined_7413", "probe_needs_7413", "Probedescription7413"
CALLED, PARAMETER, VALUES = (
    ("probe_called_7413", "probe_called_8524"),
    "probe_given_7413",
    ("Probevalue7413", "Probevalue8524"),
)
RESULTS, RESULT_NAME = ("Proberesult7413", "Proberesult8524"), "probe_named_7413"
LONG_IDS = ("call_Probe7413aaaaaaaaaaaaaa", "call_Probe8524bbbbbbbbbbbbbb")  # as OpenAI's
SHORT_IDS = ("Probe7413", "Probe8524")  # as Mistral's: 9 letters and digits

# The thread's own time for all probes. Templates of real models take 1 to 50 ms.
PROBE_BUDGET_S = 1.0

Write = Callable[..., str]  # (messages, tools=...): the template's text. Raises anything.


def find_abilities(write: Write, *, has_tools: bool) -> Abilities:
    """Probe a template, with a tool's definition if has_tools, because some templates render calls only then.

    Never raises: a template that fails on everything, or takes too long, gets messages unchanged.
    """
    try:
        return _find_abilities(Probe(write), has_tools=has_tools)
    except _OutOfTime:
        logger.warning("the chat template is too slow to be probed: it gets messages unchanged")
        return Abilities()
    except TemplateLimitError as error:
        logger.warning("the chat template %s when it is probed: it gets messages unchanged", error)
        return Abilities()


class _OutOfTime(Exception):
    """PROBE_BUDGET_S is spent."""


def _find_abilities(probe: Probe, *, has_tools: bool) -> Abilities:
    found: dict[str, Any] = {"is_known": True}
    form, definitions = _find_definitions(probe)
    probe.tools = definitions if has_tools else None
    if not has_tools:
        found["without_tools"] = next(filter(None, map(probe.works_without, WITHOUT_TOOLS)), "none")
    if probe.find_form("user") is None:  # a template of another kind of chat, or one that needs more variables
        return Abilities()
    probe.find_form("assistant", probe.user())
    probe.find_form("system")
    found |= {"tools": form, "incomplete_tools": True, "any_schemas": True}
    if probe.tools:
        found |= _find_schemas(probe, is_bare=form == "bare")
    found |= _find_calls(probe)
    # a template with neither may write a result under its role, as for any role, but its model has never seen one
    found |= _find_results(probe) if probe.has_calls or form != "no" else {"results": False}
    found |= _find_systems(probe)
    found |= _find_turns(probe)
    found["reasoning_field"] = _find_reasoning(probe)
    return Abilities(part_roles=frozenset(probe.part_roles), **found)


def find_effort(write: Write, effort: str) -> str | None:
    """The effort of EFFORTS nearest to this one that the template takes as `reasoning_effort`; None: it takes none."""
    start = EFFORTS.index(effort)
    for candidate in sorted(EFFORTS, key=lambda one: abs(EFFORTS.index(one) - start)):
        probe = Probe(functools.partial(write, reasoning_effort=candidate))
        with contextlib.suppress(_OutOfTime, TemplateLimitError):
            if probe.find_form("user") is not None:
                return candidate
    return None


@dataclass
class Probe:
    """Renders probes. Owns what is known so far about the form of messages, which later probes need."""

    write: Write
    tools: Any = None  # the template's variable
    part_roles: set[str] = field(default_factory=set)
    has_null_content: bool = False  # of a message that has calls only
    has_text_arguments: bool = False
    has_short_ids: bool = False
    has_calls: bool = False  # they are rendered
    has_results: bool = False
    _end: float = field(default_factory=lambda: time.thread_time() + PROBE_BUDGET_S)

    def message(self, role: str, text: str, **others: Any) -> Message:
        content: Any = [{"type": "text", "text": text}] if role in self.part_roles else text
        return {"role": role, "content": content, **others}

    def user(self, text: str = USERS[0]) -> Message:
        return self.message("user", text)

    def answer(self, text: str = ANSWERS[0], **others: Any) -> Message:
        return self.message("assistant", text, **others)

    def system(self, text: str = SYSTEMS[0]) -> Message:
        return self.message("system", text)

    def calls(self, num_calls: int = 1, text: str = "", *, index: int = 0, **others: Any) -> Message:
        """A message with calls, starting with the one at that index."""
        calls = []
        for call_id, name, value in list(zip(self.ids(), CALLED, VALUES, strict=True))[index : index + num_calls]:
            arguments: Any = {PARAMETER: value}
            if self.has_text_arguments:
                arguments = json.dumps(arguments)
            calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
        message = self.answer(text, tool_calls=calls, **others)
        return {**message, "content": None} if self.has_null_content and not text else message

    def result(self, index: int = 0, **others: Any) -> Message:
        return self.message("tool", RESULTS[index], tool_call_id=self.ids()[index], **others)

    def loop(self, num_calls: int = 1, **others: Any) -> list[Message]:
        """A question, calls and, if they are rendered, results. others: fields of the message with the calls."""
        said = self.calls(num_calls, **others) if self.has_calls else self.answer(**others)
        return [self.user(), said, *(self.result(index) for index in range(num_calls) if self.has_results)]

    def ids(self) -> tuple[str, str]:
        return SHORT_IDS if self.has_short_ids else LONG_IDS

    def text(self, *messages: Message) -> str | None:
        """The template's output for the conversation; None if it fails. Raises _OutOfTime."""
        if time.thread_time() > self._end:
            raise _OutOfTime
        try:
            return self.write(list(messages), tools=self.tools)
        except TemplateLimitError:
            raise
        except Exception:  # a template can raise anything
            return None

    def shows(self, *messages: Message, texts: Sequence[str] = ()) -> bool:
        """Whether the template renders all of these texts; by default, the content of all messages."""
        written = self.text(*messages)
        return written is not None and all(text in written for text in texts or map(text_of, messages))

    def works_without(self, kind: str) -> str | None:
        """`kind` if the template works with this value of `tools`, which stays set."""
        self.tools = WITHOUT_TOOLS[kind]
        return kind if self.find_form("user") is not None else None

    def find_form(self, role: str, *before: Message, **others: Any) -> Literal["string", "parts"] | None:
        """How the content of a role's messages must be passed; None if the template renders neither form."""
        for form in ("string", "parts"):
            if form == "parts":
                self.part_roles.add(role)
            if self.shows(*before, self.message(role, ANSWERS[1], **others), texts=ANSWERS[1:]):
                return form
        self.part_roles.discard(role)
        return None


def text_of(message: Message) -> str:
    content = message["content"]
    return content[0]["text"] if isinstance(content, list) else content or ""


# ---- Tools ---------------------------------------------------------------------------------------------------------


def _find_definitions(probe: Probe) -> tuple[Literal["wrapped", "bare", "system", "no"], list[dict[str, Any]] | None]:
    """The form of definitions, and the variable `tools` with one of that form."""
    properties = {DEFINED_PARAMETER: {"type": "string", "description": DESCRIPTION}}
    schema = {"type": "object", "properties": properties, "required": [DEFINED_PARAMETER]}
    function: dict[str, Any] = {"name": DEFINED, "description": DESCRIPTION, "parameters": schema}
    wrapped = {"type": "function", "function": function}
    forms: tuple[tuple[Literal["wrapped", "bare"], dict[str, Any]], ...] = (("wrapped", wrapped), ("bare", function))
    for form, tool in forms:
        probe.tools = [tool]
        for probe.part_roles in (set(), {"user"}):
            if probe.shows(probe.user(), texts=(DEFINED, DEFINED_PARAMETER, USERS[0])):
                return form, [tool]
    probe.tools, probe.part_roles = None, set()
    with_tools = describe_in_system([probe.system(), probe.user()], [wrapped])
    if probe.shows(*with_tools, texts=(DEFINED, DEFINED_PARAMETER, USERS[0], SYSTEMS[0])):
        return "system", None
    return "no", None


# Tools as some clients send them: without optional parts, and with schemas that generators write.
INCOMPLETE = {"type": "object", "properties": {DEFINED_PARAMETER: {"type": "string"}}}
UNUSUAL: dict[str, dict[str, Any]] = {
    "list": {"type": ["string", "null"]},
    "any": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "none": {"enum": ["a", 1]},
    "reference": {"$ref": "#/$defs/a"},
    "array": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}},
    "object": {"type": "object", "properties": {"a": {"type": ["integer", "null"]}}, "additionalProperties": False},
    "anything": {"type": "object"},
}


def _find_schemas(probe: Probe, *, is_bare: bool) -> dict[str, Any]:
    """Leaves the probe's tools as they are."""

    def renders(*functions: Mapping[str, Any]) -> bool:
        wrapped: Sequence[Mapping[str, Any]] = [{"type": "function", "function": function} for function in functions]
        wrapped = wrapped if found["incomplete_tools"] else complete(wrapped)
        wrapped = wrapped if found["any_schemas"] else plain(wrapped)
        probe.tools = bare(wrapped) if is_bare else wrapped
        return probe.shows(probe.user())

    found: dict[str, Any] = {"incomplete_tools": True, "any_schemas": True}
    kept = probe.tools
    nothing = ({"name": DEFINED}, {"name": DEFINED, "parameters": {}}, {"name": DEFINED, "parameters": INCOMPLETE})
    found["incomplete_tools"] = renders(*nothing)
    properties = {name: {"description": DESCRIPTION, **schema} for name, schema in UNUSUAL.items()}
    schemas = {"type": "object", "properties": properties, "required": ["any"]}
    found["any_schemas"] = renders({"name": DEFINED, "description": DESCRIPTION, "parameters": schemas})
    probe.tools = kept
    return found


def _find_calls(probe: Probe) -> dict[str, Any]:
    """How calls must be passed. Leaves the probe in that form."""
    for probe.has_short_ids, probe.has_text_arguments in itertools.product((False, True), repeat=2):
        written = {is_null: _written_call(probe, is_null=is_null) for is_null in (False, True)}
        rendered = [is_null for is_null, text in written.items() if text is not None]
        if rendered:
            # some write an empty answer beside the calls for ""
            probe.has_null_content = min(rendered, key=lambda is_null: len(written[is_null] or ""))
            probe.has_calls = True
            return _details_of_calls(probe)
    probe.has_short_ids = probe.has_text_arguments = probe.has_null_content = False
    return {"calls": False}


def _written_call(probe: Probe, *, is_null: bool) -> str | None:
    """The template's text of the call; None if its arguments are garbled or something is missing."""
    probe.has_null_content = is_null
    written = probe.text(probe.user(), probe.calls())
    if written is None or CALLED[0] not in written or VALUES[0] not in written:
        return None
    # an object in Python's notation, JSON text as a string within JSON, null as text
    wrong = (f"'{PARAMETER}'", f'\\"{PARAMETER}', *(("None",) if is_null else ()))
    return None if any(text in written for text in wrong) else written


def _details_of_calls(probe: Probe) -> dict[str, Any]:
    user, call = probe.user(), probe.calls()
    found: dict[str, Any] = {
        "calls": True,
        "arguments": "text" if probe.has_text_arguments else "object",
        "short_ids": probe.has_short_ids,
        "call_content": "null" if probe.has_null_content else "empty",
        "text_with_calls": _find_text_with_calls(probe),
        "needs_ids": probe.text(user, _without_ids(call)) is None,
        "unanswered_calls": probe.shows(user, call, probe.user(USERS[1]), texts=(VALUES[0], USERS[1])),
    }
    if not probe.has_text_arguments:
        [of_call] = call["tool_calls"]
        malformed = {**of_call, "function": {**of_call["function"], "arguments": VALUES[0]}}
        found["malformed_arguments"] = probe.text(user, {**call, "tool_calls": [malformed]}) is not None
    return found


def _find_text_with_calls(probe: Probe) -> Literal["content", "tool_plan", "no", "hides"]:
    chat = (probe.user(), probe.calls(text=ANSWERS[0]))
    if not probe.shows(*chat, texts=(CALLED[0], VALUES[0])):
        return "hides"
    results = [probe.result()] if probe.shows(*chat, probe.result(), texts=VALUES[:1]) else []
    if probe.shows(*chat, *results, texts=ANSWERS[:1]):  # Gemma 4 writes it after the result
        return "content"
    planned = probe.shows(probe.user(), probe.calls(tool_plan=ANSWERS[0]), texts=(VALUES[0], ANSWERS[0]))
    return "tool_plan" if planned else "no"


def _find_results(probe: Probe) -> dict[str, Any]:
    user, said = probe.loop()
    if probe.find_form("tool", user, said, tool_call_id=probe.ids()[0]) is None:
        return {"results": False}
    probe.has_results = True
    found: dict[str, Any] = {"results": True, "needs_result_names": _needs_names(probe)}
    if not probe.has_calls:
        return found
    if probe.text(user, _without_ids(said), _without_ids(probe.result())) is None:
        found["needs_ids"] = True
    return found | _find_order_of_calls(probe)


def _find_order_of_calls(probe: Probe) -> dict[str, Any]:
    user, question, answer = probe.user(), probe.user(USERS[1]), probe.answer()
    first, second = (probe.calls(index=index) for index in (0, 1))
    results = (probe.result(0), probe.result(1))
    answer_first = (user, answer, first, results[0], probe.answer(ANSWERS[1]), question)
    orphans = ((user, results[0]), (results[0], answer, user))
    return {
        "parallel_calls": probe.shows(*probe.loop(2), texts=(*VALUES, *RESULTS)),
        "consecutive_calls": probe.shows(user, first, second, *results, texts=(*VALUES, *RESULTS)),
        "answer_before_calls": probe.shows(*answer_first, texts=(*ANSWERS, VALUES[0], RESULTS[0])),
        "orphan_results": all(probe.shows(*messages) for messages in orphans),
    }


def _without_ids(message: Message) -> Message:
    kept = {name: value for name, value in message.items() if name != "tool_call_id"}
    if "tool_calls" in kept:
        kept["tool_calls"] = [{name: call[name] for name in ("type", "function")} for call in kept["tool_calls"]]
    return kept


def _needs_names(probe: Probe) -> bool:
    """Whether results without the function's name fail, or leave a gap where the name would be."""
    before = probe.loop()[:2]
    named = probe.text(*before, probe.result(name=RESULT_NAME))
    if named is None or RESULT_NAME not in named:
        return False
    unnamed = probe.text(*before, probe.result())
    return unnamed is None or unnamed in (named.replace(RESULT_NAME, ""), named.replace(RESULT_NAME, "None"))


# ---- System messages -----------------------------------------------------------------------------------------------


def _find_systems(probe: Probe) -> dict[str, Any]:
    system, later = probe.system(), probe.system(SYSTEMS[1])
    user, answer, question = probe.user(), probe.answer(), probe.user(USERS[1])
    found: dict[str, Any] = {"later_systems": _takes_later_systems(probe)}
    if not probe.shows(system, user):
        return found | {"system": "no"}
    written = probe.text(system, user, answer, question) or ""
    is_last = 0 <= written.find(ANSWERS[0]) < written.find(SYSTEMS[0])
    return found | {
        "system": "last user" if is_last else "first",
        "several_systems": probe.shows(system, later, user),
        "system_needs_last_user": not all(
            probe.shows(system, *messages, texts=SYSTEMS[:1]) for messages in ((user, answer), probe.loop())
        ),
        "needs_user": not probe.shows(system, texts=(SYSTEMS[0], DEFINED) if probe.tools else ()),
    }


def _takes_later_systems(probe: Probe) -> bool:
    """Whether they are rendered in any place, and not as the assistant's."""
    system, later = probe.system(), probe.system(SYSTEMS[1])
    user, answer, question = probe.user(), probe.answer(), probe.user(USERS[1])
    between = (user, answer, later, question)
    if not all(probe.shows(*messages) for messages in (between, (system, *between), (system, user, later))):
        return False
    if probe.has_results and not probe.shows(system, *probe.loop(), later, texts=(*SYSTEMS, RESULTS[0])):
        return False
    return probe.text(*between) != probe.text(user, answer, probe.answer(SYSTEMS[1]), question)


# ---- Turns ---------------------------------------------------------------------------------------------------------


def _find_turns(probe: Probe) -> dict[str, Any]:
    user, question, answer = probe.user(), probe.user(USERS[1]), probe.answer()
    return {
        "consecutive_users": probe.shows(user, question) and probe.shows(user, answer, question, probe.user(USERS[2])),
        "consecutive_assistants": probe.shows(user, answer, probe.answer(ANSWERS[1]), question),
        "user_after_result": not probe.has_results
        or probe.shows(*probe.loop(), question, texts=(RESULTS[0], USERS[1])),
        "assistant_first": probe.shows(answer, question),
        "empty_users": probe.shows(probe.user(""), answer, question),
        "empty_assistants": probe.shows(user, probe.answer(""), question),
    }


def _find_reasoning(probe: Probe) -> str | None:
    """The name under which a message's reasoning is rendered. Many templates render it only within a turn."""
    for name in REASONING_FIELDS:
        thought: dict[str, Any] = {name: THOUGHT}
        answered = (probe.user(), probe.answer(**thought))
        chats = [answered, (*answered, probe.user(USERS[1])), probe.loop(**thought), probe.loop(**thought)[:2]]
        if any(probe.shows(*messages, texts=(THOUGHT,)) for messages in chats):
            return name
    parts = [thinking_part(THOUGHT), {"type": "text", "text": ANSWERS[0]}]
    if probe.shows(probe.user(), {"role": "assistant", "content": parts}, texts=(THOUGHT, ANSWERS[0])):
        whole = probe.text(probe.user(), {"role": "assistant", "content": parts}) or ""
        return None if "'thinking'" in whole or '"thinking"' in whole else "content"  # a list written verbatim
    return None
