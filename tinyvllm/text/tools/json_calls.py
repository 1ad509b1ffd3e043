"""Calls that are written as JSON objects, read character by character."""

from __future__ import annotations

import json
from typing import Literal

from tinyvllm.text.tools.events import CallArguments, CallBegin, Event

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
        self._characters = [first]
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
        self._characters.append(character)
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
        text = "".join(self._characters)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text


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
