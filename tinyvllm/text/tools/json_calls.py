"""Parse calls that are written as JSON objects, character by character."""

from __future__ import annotations

import json
from typing import Literal

from tinyvllm.text.tools.events import CallArguments, CallBegin, Event

# The keys that may precede a call's name in its object. Any other key there means that it is not a call.
_KEYS_OF_CALLS = ("name", "arguments", "parameters", "type", "id", "function")
_BLANKS = " \t\r\n"


class CallReader:
    """Reads {"name": ..., "arguments": {...}}, character by character, from the opening brace.

    `state` is "open", then "done", or "broken" if it is not a call. A name that was reported is never retracted.
    `parameters` is a synonym of `arguments`.
    """

    def __init__(self, index: int, names: frozenset[str] | None = None) -> None:
        """names: the available functions; an object with another name is not a call. None: any name is accepted."""
        self.state: Literal["open", "done", "broken"] = "open"
        self._index = index
        self._names = names
        self._expected: Literal["object", "key", "colon", "value", "comma"] = "object"
        self._key = ""
        self._value: ValueReader | None = None
        self._name: str | None = None
        self._arguments = ""  # read, but not reported yet
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
            return self._report(character) if self._is_arguments else []
        elif expected == "comma" and character == ",":
            self._expected = "key"
        elif expected in ("key", "comma") and character == "}":
            return self._finish()
        else:
            self.state = "broken"
        return []

    @property
    def has_begun(self) -> bool:
        """Whether the call was reported."""
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
        if not value.read(character):  # a number or a word, which only the next character ends
            events = self._end_value(value)
            return events + (self.read(character) if self.state == "open" else [])
        events = self._report(character) if self._is_arguments else []
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
        if self._key == "function" and self._name is None:  # OpenAI's own format: an object or a name
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

    def _report(self, text: str) -> list[Event]:
        """A piece of the arguments. They are reported after the name only, and in one piece if not an object."""
        assert self._value is not None
        self._arguments += text
        return self._take_arguments() if self._value.is_container and self._name is not None else []

    def _end_arguments(self, value: ValueReader) -> list[Event]:
        if not value.is_container:
            content = value.loads()
            if isinstance(content, str):  # an object, quoted as a string
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
    """Reads one JSON value, without validating the inside of its brackets."""

    def __init__(self, first: str) -> None:
        self._characters = [first]
        self.is_string = first == '"'
        self.is_container = first in "{["
        self.is_done = False
        self._depth = int(self.is_container)
        self.is_in_string = self.is_string
        self._is_escaped = False

    def read(self, character: str) -> bool:
        """Read a character. False if it is not part of the value, a number or a word, which ended before it."""
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
        """The value, or its text if that is not JSON."""
        text = "".join(self._characters)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text


class ListReader:
    """Reads one call, or a list of calls in brackets, or calls with separators between them.

    `state` is "open" before, in and between calls, "done" after a list's closing bracket, and "broken" at anything that
    is not a call. After "done" and "broken" nothing more is read.
    """

    def __init__(self, first_index: int, names: frozenset[str] | None = None, separators: str = "") -> None:
        """separators: characters, besides whitespace, that may separate calls outside a list."""
        self.state: Literal["open", "done", "broken"] = "open"
        self.num_reported = 0
        self._first_index = first_index
        self._names = names
        self._separators = separators
        self._is_list = False
        self._call: CallReader | None = None

    @property
    def is_pending(self) -> bool:
        """Whether the latest characters do not belong to a reported call."""
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
            self._call = CallReader(self._first_index + self.num_reported, self._names)
            self._call.read(character)
        elif character == "[" and not self._is_list and self.num_reported == 0:
            self._is_list = True
        elif character == "]" and self._is_list:
            self.state = "done" if self.num_reported else "broken"
        elif character not in _BLANKS and character not in ("," if self._is_list else self._separators):
            self.state = "broken"
        return []

    def _read_call(self, call: CallReader, character: str) -> list[Event]:
        events = call.read(character)
        self.num_reported += any(isinstance(event, CallBegin) for event in events)
        if call.state == "broken":
            self.state = "broken"
        elif call.state == "done":
            self._call = None
        return events
