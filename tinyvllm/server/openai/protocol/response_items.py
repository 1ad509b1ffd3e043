"""The items of a response's input, and how they become messages for a chat template.

Every type that OpenAI documents is accepted. Items that a model can read become messages; the others are skipped, and
logged once for each type. docs/SERVING.md has a table of the rules.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict

from tinyvllm.errors import RequestError
from tinyvllm.server.notices import warn_once
from tinyvllm.server.openai.protocol.content import join_parts, note_media
from tinyvllm.text.messages import parse_object
from tinyvllm.text.tools.custom import input_arguments

ItemType = Literal[
    "message", "reasoning", "item_reference",
    "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output",
    "local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output",
    "apply_patch_call", "apply_patch_call_output", "tool_search_call", "tool_search_output",
    "computer_call", "computer_call_output", "web_search_call", "file_search_call", "image_generation_call",
    "code_interpreter_call", "mcp_call", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response",
    "program", "program_output", "additional_tools", "configuration_update", "compaction", "compaction_summary",
    "compaction_trigger",
]  # fmt: skip

Message = dict[str, Any]


class InputItem(BaseModel):
    """One item of `input`. `type` says which fields apply."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: ItemType = "message"
    id: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Any = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: Any = None
    output: Any = None
    summary: Any = None

    def get(self, name: str) -> Any:
        """A field that only some types have; None if missing."""
        return (self.model_extra or {}).get(name)


def _add_type(value: object) -> object:
    """Add the type to an item without one, such as a reference."""
    if isinstance(value, dict) and value.get("type") is None:
        kind = "item_reference" if "id" in value and "role" not in value and "content" not in value else "message"
        return {**value, "type": kind}
    return value


AnyItem = Annotated[InputItem, BeforeValidator(_add_type, json_schema_input_type=InputItem)]


def qualified(name: str, namespace: str | None) -> str:
    """The name under which a model is offered a namespace's tool."""
    return name if not namespace else f"{namespace.removesuffix('__')}__{name}"


# ---- Items as messages ----


@dataclass(frozen=True)
class _Position:
    """An item, and its path in the request for messages."""

    item: InputItem
    param: str

    def required(self, name: str) -> str:
        value = getattr(self.item, name, None) or self.item.get(name)
        if not isinstance(value, str):
            raise RequestError(f"{self.param}.{name} is missing: give a string", param=f"{self.param}.{name}")
        return value


def messages_of(items: Sequence[InputItem], first: int = 0) -> list[Message]:
    """Items as messages. The assistant's reasoning, text and calls between other messages become one message.

    first: position of the first item in the request's input; negative if earlier responses precede it.
    """
    messages: list[Message] = []
    for number, item in enumerate(items, first):
        position = _Position(item, f"input.{number}")
        _RENDERERS.get(item.type, _skip)(messages, position)
    return messages


def _add_message(messages: list[Message], at: _Position) -> None:
    role = at.item.role or "user"
    content = _text(at.item.content, f"{at.param}.content")
    if role == "assistant" and messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages[-1]["content"] = content
    else:
        messages.append({"role": "system" if role == "developer" else role, "content": content})


def _add_reasoning(messages: list[Message], at: _Position) -> None:
    """Add the full text if it is there, else the one that this server sealed, else the summary."""
    item = at.item
    text = _text(item.content or [], f"{at.param}.content") or unseal(item.get("encrypted_content"))
    text = text or _text(item.summary or [], f"{at.param}.summary")
    last = messages[-1] if messages else {}
    if text and last.get("reasoning_content") and not last["content"] and "tool_calls" not in last:
        last["reasoning_content"] += f"\n{text}"
    elif text:
        messages.append({"role": "assistant", "content": "", "reasoning_content": text})


def _add_call(messages: list[Message], call_id: str | None, name: str, arguments: object) -> None:
    call: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call if call_id is None else {"id": call_id, **call})


def _add_result(messages: list[Message], call_id: str | None, text: str) -> None:
    messages.append({"role": "tool", **({} if call_id is None else {"tool_call_id": call_id}), "content": text})


def _add_function_call(messages: list[Message], at: _Position) -> None:
    name = qualified(at.required("name"), at.item.namespace)
    _add_call(messages, at.required("call_id"), name, parse_object(at.item.arguments))


def _add_custom_call(messages: list[Message], at: _Position) -> None:
    text = at.item.get("input")
    if not isinstance(text, str):
        raise RequestError(f"{at.param}.input is missing: give a string", param=f"{at.param}.input")
    name = qualified(at.required("name"), at.item.namespace)
    _add_call(messages, at.required("call_id"), name, input_arguments(text))


def _add_output(messages: list[Message], at: _Position) -> None:
    """Add the result of a call that the client ran: text, or parts, with notes in place of those that are not text."""
    _add_result(messages, at.required("call_id"), _text(note_media(at.item.output), f"{at.param}.output"))


def _add_hosted_call(name: str, *fields: str) -> Callable[[list[Message], _Position], None]:
    """The renderer of a call of one of OpenAI's own tools: a function of that name, whose arguments are the fields of
    the item that describe the call."""

    def add(messages: list[Message], at: _Position) -> None:
        given = {field: getattr(at.item, field, None) or at.item.get(field) for field in fields}
        arguments = {field: value for field, value in given.items() if value is not None}
        inner = arguments.get(fields[0]) if len(fields) == 1 else None
        _add_call(messages, at.item.call_id or at.item.id, name, inner if isinstance(inner, dict) else arguments)

    return add


def _add_hosted_output(messages: list[Message], at: _Position) -> None:
    """Add the result of one of OpenAI's own tools that the client ran."""
    output = at.item.output if at.item.output is not None else at.item.get("result") or at.item.get("tools")
    text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
    _add_result(messages, at.item.call_id or at.item.id, text if output is not None else str(at.item.get("status")))


def _add_mcp_call(messages: list[Message], at: _Position) -> None:
    """Add a call that a hosted service ran, with the result in the same item."""
    name = qualified(at.required("name"), at.item.get("server_label"))
    _add_call(messages, at.item.id, name, parse_object(at.item.arguments))
    result = at.item.output if at.item.output is not None else at.item.get("error")
    if result is not None:
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        _add_result(messages, at.item.id, text)


def _add_interpreter_call(messages: list[Message], at: _Position) -> None:
    _add_call(messages, at.item.id, "code_interpreter", {"code": at.item.get("code") or ""})
    outputs = at.item.get("outputs") or []
    logs = [part.get("logs", "") for part in outputs if isinstance(part, dict) and part.get("type") == "logs"]
    _add_result(messages, at.item.id, "\n".join(logs))


def _add_file_search(messages: list[Message], at: _Position) -> None:
    results = at.item.get("results")
    if not results:  # OpenAI returns them only if the request asks for them
        _skip(messages, at)
        return
    _add_call(messages, at.item.id, "file_search", {"queries": at.item.get("queries") or []})
    _add_result(messages, at.item.id, json.dumps(results, ensure_ascii=False))


def _refuse_reference(messages: list[Message], at: _Position) -> None:
    raise AssertionError(f"{at.param} is a reference that has not been resolved")


def _refuse_trigger(messages: list[Message], at: _Position) -> None:
    raise RequestError(
        f"{at.param}: compaction_trigger is not supported, because this server does not compact conversations: leave "
        "it out, and ask the model for a summary or send truncation='auto'",
        param=at.param,
    )


def _skip(messages: list[Message], at: _Position) -> None:
    """Skip an item that holds nothing a model could read here."""
    warn_once("input items of type %s are skipped: a model cannot read them here", at.item.type)


_RENDERERS: Mapping[str, Callable[[list[Message], _Position], None]] = {
    "message": _add_message,
    "reasoning": _add_reasoning,
    "item_reference": _refuse_reference,
    "function_call": _add_function_call,
    "function_call_output": _add_output,
    "custom_tool_call": _add_custom_call,
    "custom_tool_call_output": _add_output,
    "local_shell_call": _add_hosted_call("local_shell", "action"),
    "local_shell_call_output": _add_hosted_output,
    "shell_call": _add_hosted_call("shell", "action"),
    "shell_call_output": _add_hosted_output,
    "apply_patch_call": _add_hosted_call("apply_patch", "operation"),
    "apply_patch_call_output": _add_hosted_output,
    "tool_search_call": _add_hosted_call("tool_search", "arguments"),
    "tool_search_output": _add_hosted_output,
    "program": _add_hosted_call("program", "code"),
    "program_output": _add_hosted_output,
    "additional_tools": lambda messages, at: None,  # the request's toolbox has them
    "mcp_call": _add_mcp_call,
    "code_interpreter_call": _add_interpreter_call,
    "file_search_call": _add_file_search,
    "compaction_trigger": _refuse_trigger,
}
assert _RENDERERS.keys() <= set(get_args(ItemType))


def _text(content: object, param: str) -> str:
    try:
        text = join_parts(content)
    except ValueError as error:
        raise RequestError(f"{param}: {error}", param=param) from None
    if not isinstance(text, str):
        raise RequestError(f"{param} is missing: give a string or text parts", param=param)
    return text


def listed(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item as the server lists it: with a status, and the content of a message as parts."""
    item = {"status": "completed", **item}
    if item["type"] != "message" or not isinstance(item.get("content"), str):
        return item
    part: dict[str, Any] = {"type": "input_text", "text": item["content"]}
    if item.get("role") == "assistant":
        part = {**part, "type": "output_text", "annotations": []}
    return {"role": "user", **item, "content": [part]}


# ---- Sealed reasoning ----

_SEAL = "tinyvllm:"


def seal(reasoning: str) -> str:
    """Reasoning in the form of `encrypted_content`, for clients that keep only that. It is not secret: the same item
    has it as text."""
    return _SEAL + base64.b64encode(zlib.compress(reasoning.encode())).decode()


_MAX_UNSEALED = 2**24  # bytes; far beyond any context, and a bound on what a small request can make us allocate


def unseal(sealed: object) -> str:
    """The reasoning that `seal` has sealed; empty for what others have encrypted."""
    if not isinstance(sealed, str) or not sealed.startswith(_SEAL):
        return ""
    try:
        data = base64.b64decode(sealed.removeprefix(_SEAL), validate=True)
        return zlib.decompressobj().decompress(data, _MAX_UNSEALED).decode()
    except (binascii.Error, zlib.error, UnicodeDecodeError):
        return ""
