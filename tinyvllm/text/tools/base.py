"""What the families share: tools, the events that a parser makes of a model's text, and calls written in JSON.

Every parser is a machine that reads characters one by one, so that the calls are the same however a text is cut.
"""

from __future__ import annotations

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tinyvllm.text.grammar import lark_json, lark_string

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None  # a JSON schema; None: it takes none
    is_strict: bool = False  # arguments must be of the schema, even where the model is free to call or not
    param: str = "tools"  # where the request has its schema, for messages

    def rule(self, *, is_enforced: bool = True) -> str:
        """Lark's rule body of its arguments. Raises RequestError where the schema cannot be enforced."""
        nothing = {"type": "object", "properties": {}, "additionalProperties": False}
        schema = self.parameters or nothing
        return lark_json(schema if is_enforced else {"type": "object"}, self.param)


# ---- Events ----


@dataclass(frozen=True)
class Text:
    """Words for the user."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call of a function; its arguments follow. index counts the message's calls."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of a call's arguments, as JSON."""

    index: int
    text: str


Event = Text | CallBegin | CallArguments


def joined(events: list[Event]) -> list[Event]:
    """Neighbours of one kind as one event."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.index == last.index:
            out[-1] = CallArguments(event.index, last.text + event.text)
        else:
            out.append(event)
    return out


class ToolParser(ABC):
    """Splits one message into text and calls. Owns what may yet become either.

    Blanks between text and a call, and between calls, are the format's and are left out.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._blanks = ""  # held: they are text only if text follows
        self._is_after_call = False

    def push(self, text: str) -> list[Event]:
        """What has become certain."""
        events: list[Event] = []
        for character in text:
            events += self._read(character)
        return joined(events)

    @abstractmethod
    def flush(self) -> list[Event]:
        """The rest, once nothing follows."""

    @abstractmethod
    def _read(self, character: str) -> list[Event]: ...

    def _text(self, text: str) -> list[Event]:
        """Text, its blanks at the end held back."""
        text = self._blanks + text
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        if not kept:
            return []
        if self._is_after_call:
            kept = kept.lstrip()
        self._is_after_call = False
        return [Text(kept)]

    def _end_text(self) -> list[Event]:
        blanks, self._blanks = self._blanks, ""
        return [Text(blanks)] if blanks and not self._is_after_call else []

    def _called(self, events: list[Event]) -> list[Event]:
        """Events of a call, noted."""
        for event in events:
            if isinstance(event, CallBegin):
                self._blanks, self._is_after_call = "", True
                self.num_calls += 1
        return events


# ---- Calls as JSON objects ----

# What may stand in a call's object before its name. Another key there: it is no call.
_KEYS_OF_CALLS = ("name", "arguments", "parameters", "type", "id", "function")
_BLANKS = " \t\r\n"


class CallReader:
    """Reads {"name": ..., "arguments": {...}}, character by character, from its brace.

    `state` is "open", then "done", or "broken" where it is no call. A name that was told is not taken back.
    `parameters` is another word for arguments.
    """

    def __init__(self, index: int, names: frozenset[str] | None = None) -> None:
        """names: of the functions that there are; another name is no call. None: any name is."""
        self.state: Literal["open", "done", "broken"] = "open"
        self._index = index
        self._names = names
        self._expected: Literal["object", "key", "colon", "value", "comma"] = "object"
        self._key = ""
        self._value: ValueReader | None = None
        self._name: str | None = None
        self._is_name_due = False
        self._arguments = ""  # read, and not told yet
        self._has_arguments = False

    def read(self, character: str) -> list[Event]:
        if self._value is not None:
            return self._read_value(character)
        if character in _BLANKS:
            return []
        expected = self._expected
        if expected == "object" and character == "{":
            self._expected = "key"
        elif expected == "key" and character == '"':
            self._value = ValueReader(character)
        elif expected == "colon" and character == ":":
            self._expected = "value"
        elif expected == "value" and character not in ",:]}":
            self._value = ValueReader(character)
            return self._tell(character) if self._is_arguments else []
        elif expected == "comma" and character == ",":
            self._expected = "key"
        elif expected in ("key", "comma") and character == "}":
            return self._finish()
        else:
            self.state = "broken"
        return []

    @property
    def has_begun(self) -> bool:
        """The call was told."""
        return self._name is not None

    @property
    def is_in_string(self) -> bool:
        return self._value is not None and self._value.is_in_string

    @property
    def _is_arguments(self) -> bool:
        return self._expected == "value" and self._key in ("arguments", "parameters")

    def _read_value(self, character: str) -> list[Event]:
        value = self._value
        assert value is not None
        if not value.read(character):  # a number or a word: only what follows shows its end
            events = self._end_value(value)
            return events + (self.read(character) if self.state == "open" else [])
        events = self._tell(character) if self._is_arguments else []
        return events + (self._end_value(value) if value.is_done else [])

    def _end_value(self, value: ValueReader) -> list[Event]:
        self._value = None
        if self._expected == "key":
            self._key, self._expected = str(value.loads()), "colon"
            if self._name is None and self._key not in _KEYS_OF_CALLS:
                self.state = "broken"
            return []
        was_arguments = self._is_arguments
        self._expected = "comma"
        if was_arguments:
            return self._end_arguments(value)
        if self._key == "name" and self._name is None:
            return self._begin(value.loads())
        if self._key == "function" and self._name is None:  # OpenAI's own form, an object or a name
            function = value.loads()
            if isinstance(function, dict):
                arguments = function.get("arguments", function.get("parameters", {}))
                self._arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
                self._has_arguments = True
                function = function.get("name")
            return self._begin(function)
        return []

    def _begin(self, name: object) -> list[Event]:
        if not isinstance(name, str) or not name or (self._names is not None and name not in self._names):
            self.state = "broken"
            return []
        self._name = name
        return [CallBegin(self._index, name), *self._take_arguments()]

    def _tell(self, text: str) -> list[Event]:
        """A piece of the arguments. What is no object is told as a whole, and all of it only after the name."""
        assert self._value is not None
        self._arguments += text
        return self._take_arguments() if self._value.is_container and self._name is not None else []

    def _end_arguments(self, value: ValueReader) -> list[Event]:
        if not value.is_container:
            content = value.loads()
            if isinstance(content, str):  # in quotes: the text of an object
                self._arguments = content
            elif content is None:
                self._arguments = ""
        self._has_arguments = bool(self._arguments) or value.is_container
        return [] if self._name is None else self._take_arguments()

    def _take_arguments(self) -> list[Event]:
        text, self._arguments = self._arguments, ""
        return [CallArguments(self._index, text)] if text else []

    def _finish(self) -> list[Event]:
        if self._name is None:
            self.state = "broken"
            return []
        self.state = "done"
        return [] if self._has_arguments else [CallArguments(self._index, "{}")]


class ValueReader:
    """Reads one JSON value, without judging what is inside of its brackets."""

    def __init__(self, first: str) -> None:
        self.text = first
        self.is_string = first == '"'
        self.is_container = first in "{["
        self.is_done = False
        self._depth = int(self.is_container)
        self.is_in_string = self.is_string
        self._is_escaped = False

    def read(self, character: str) -> bool:
        """False: the character does not belong to the value, a number or a word, which ended before it."""
        if not self.is_string and not self.is_container and character in ",}] \t\r\n":
            self.is_done = True
            return False
        self.text += character
        if self.is_in_string:
            self._read_in_string(character)
        elif character == '"':
            self.is_in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_done = self._depth == 0
        return True

    def _read_in_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self.is_in_string = False
            self.is_done = self.is_string

    def loads(self) -> object:
        """The value; its text where it is no JSON."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            return self.text


class ListReader:
    """Reads one call, or a list of calls in brackets, or calls with separators between them.

    `state` is "open" before the first call, in a call and between calls, "done" after a list's bracket, and "broken"
    at what is no call; it reads nothing after these two.
    """

    def __init__(self, first_index: int, names: frozenset[str] | None = None, separators: str = "") -> None:
        """separators: characters besides blanks that may stand between calls outside of a list."""
        self.state: Literal["open", "done", "broken"] = "open"
        self.num_told = 0
        self._first_index = first_index
        self._names = names
        self._separators = separators
        self._is_list = False
        self._call: CallReader | None = None

    @property
    def is_pending(self) -> bool:
        """What was read last belongs to no call that was told."""
        return self._call is None or not self._call.has_begun

    @property
    def is_in_call(self) -> bool:
        return self._call is not None

    @property
    def is_in_string(self) -> bool:
        return self._call is not None and self._call.is_in_string

    def read(self, character: str) -> list[Event]:
        if self.state != "open":
            return []
        if self._call is not None:
            return self._read_call(self._call, character)
        if character == "{":
            self._call = CallReader(self._first_index + self.num_told, self._names)
            self._call.read(character)
        elif character == "[" and not self._is_list and self.num_told == 0:
            self._is_list = True
        elif character == "]" and self._is_list:
            self.state = "done" if self.num_told else "broken"
        elif character not in _BLANKS and character not in ("," if self._is_list else self._separators):
            self.state = "broken"
        return []

    def _read_call(self, call: CallReader, character: str) -> list[Event]:
        events = call.read(character)
        self.num_told += any(isinstance(event, CallBegin) for event in events)
        if call.state == "broken":
            self.state = "broken"
        elif call.state == "done":
            self._call = None
        return events


# ---- Families ----

_ID_CHARACTERS = string.ascii_letters + string.digits


class ToolFormat(ABC):
    """How a family of models writes calls."""

    name: str  # what --tool-call-parser calls it
    marks: tuple[str, ...]  # texts in the chat templates of the family
    special_texts: tuple[str, ...] = ()  # marks of calls that are special tokens in some vocabularies
    id_prefix = "call_"
    id_length = 24

    def is_named_in(self, template_source: str) -> bool:
        return any(mark in template_source for mark in self.marks)

    def make_id(self) -> str:
        return self.id_prefix + "".join(secrets.choice(_ID_CHARACTERS) for _ in range(self.id_length))

    def shows_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """The output's special tokens must be kept as text, since marks of calls are among them."""
        return any(special_id(tokenizer, text) is not None for text in self.special_texts)

    @abstractmethod
    def parser(self, names: frozenset[str]) -> ToolParser:
        """A parser of one message. names: of the functions that there are."""

    @abstractmethod
    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        """Lark of one call at least, and with is_parallel of several. Raises RequestError for a schema."""

    @abstractmethod
    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        """Lark of text or calls, as the model likes, where strict tools' arguments are of their schema."""

    @abstractmethod
    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls, {"name": ..., "arguments": {...}} each, as the model would write them."""

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], *, has_template: bool
    ) -> list[Mapping[str, Any]]:
        """The messages as the chat template gets them.

        has_template: it writes tools, calls and results by itself. Where it would leave them out they become text.
        """
        if has_template:
            return list(messages)
        written = [self._as_text(message) for message in messages]
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
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters or {}} for tool in tools
        )
        lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
        return f"You can call functions. To call one, answer with nothing but:\n{example}\nThe functions:\n{lines}"

    def _as_text(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A call as the model would write it, a result as words of the user."""
        if message["role"] == "tool":
            of = message.get("name") or message.get("tool_call_id")
            content = message.get("content", "")
            return {"role": "user", "content": f"Result of the call{f' {of}' if of else ''}: {content}"}
        calls = message.get("tool_calls")
        if not calls:
            return message
        functions = [call.get("function", {}) for call in calls]
        text = self.write([{"name": f.get("name"), "arguments": f.get("arguments", {})} for f in functions])
        content = message.get("content")
        kept = {name: value for name, value in message.items() if name != "tool_calls"}
        return {**kept, "content": f"{content}\n{text}" if content else text}


def special_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of a special token, if the text is one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] in tokenizer.special_ids else None


def mark(tokenizer: Tokenizer, text: str) -> str:
    """A mark in Lark: a special token by its id, which no literal matches, or a literal."""
    token_id = special_id(tokenizer, text)
    return lark_string(text) if token_id is None else f"<[{token_id}]>"


def marked_head(begin: str) -> str:
    """The rule `head` of a text and the mark that ends it. A literal does so at its first place; a special token
    cannot be inside of a text at all."""
    return f"head: TEXT {begin}\n" if begin.startswith("<[") else f"head[lazy]: TEXT {begin}\n"


TEXT_RULE = "TEXT: /(.|\\n)*/\n"


def call_rules(tools: Sequence[Tool], arguments_key: str, *, all_strict: bool = True) -> str:
    """Lark's rule `call` of one call's object: the name first, so that it can be told before the arguments are."""
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        head = lark_string(f'{{"name": {json.dumps(tool.name)}, "{arguments_key}": ')
        rules.append(f"call_{index}: {head} args_{index} {lark_string('}')}")
        rules.append(f"args_{index}: {tool.rule(is_enforced=all_strict or tool.is_strict)}")
    return "\n".join(rules) + "\n"
