"""OpenAI's harmony format, which gpt-oss uses: messages in channels, of which one parser reads reasoning, content and
calls. A call is a message in the channel `commentary` that is addressed to `functions.NAME`.

https://github.com/openai/harmony/blob/20cd04c17fa327f01f9f28240fb70183d4feb406/docs/format.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.errors import RequestError
from tinyvllm.text.detokenizer import SPECIAL_MARK
from tinyvllm.text.grammar import lark_string
from tinyvllm.text.template_environment import Verbatim
from tinyvllm.text.tools.base import TEXT_RULE, Tool, ToolFormat, mark, named_call_rules
from tinyvllm.text.tools.harmony_parser import CHANNEL, CONSTRAIN, FUNCTIONS, MESSAGE, START, HarmonyParser, Header

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer

END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
# `reasoning_effort`: what the model was trained with, for the values of OpenAI's API
EFFORTS = {
    "none": "low", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high",
}  # fmt: skip


class HarmonyFormat(ToolFormat):
    marks = (f"{CHANNEL}analysis", f"{CHANNEL}commentary")
    special_texts = (START, CHANNEL, CONSTRAIN, MESSAGE, END)

    def parser(self, tools: Mapping[str, Tool]) -> HarmonyParser:
        return HarmonyParser(frozenset(tools))

    def completion_parser(
        self, tools: Mapping[str, Tool] | None, prompt: str, *, is_marked: bool, is_chat: bool, splits_reasoning: bool
    ) -> HarmonyParser:
        """tools: None if the request has none. prompt: its end, from the last `<|start|>` on. is_marked: the marks are
        special tokens, which `SPECIAL_MARK` precedes. is_chat, splits_reasoning: see HarmonyParser."""
        names = None if tools is None else frozenset(tools)
        special_mark = SPECIAL_MARK if is_marked else ""
        opening = _opening(prompt)
        return HarmonyParser(names, opening, special_mark, is_chat=is_chat, splits_reasoning=splits_reasoning)

    # ---- Prompts ----

    def template_arguments(self, arguments: Mapping[str, Any], param: str = "reasoning_effort") -> dict[str, Any]:
        """The template's variables, with an effort that the model knows. Raises RequestError for an unknown one."""
        effort = arguments.get("reasoning_effort")
        if effort is None:
            return {name: value for name, value in arguments.items() if name != "reasoning_effort"}
        if effort not in EFFORTS:
            raise RequestError(f"{param} is {effort!r:.40}: choose from {', '.join(EFFORTS)}", param=param)
        return {**arguments, "reasoning_effort": EFFORTS[effort]}

    def opening(self, prompt: str) -> str:
        """The end of the prompt, as far as the parser needs it: the header of the message that it leaves open."""
        head, is_inside, _ = f"{START}{_opening(prompt)}".partition(MESSAGE)
        return head + is_inside

    def without_reasoning(self) -> str:
        """What follows the prompt if the answer is to begin at once."""
        return f"{CHANNEL}final{MESSAGE}"

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], *, has_template: bool
    ) -> list[Mapping[str, Any]]:
        """Messages as gpt-oss's template expects them: reasoning in `thinking`, one call a message with its result
        after it, instructions only in the first message. Results are written as they are, not as strings in JSON, as
        OpenAI's own renderer does."""
        prepared = super().prepare(messages, tools, has_template=has_template)
        return _in_order(_with_instructions_first(prepared)) if has_template else prepared

    # ---- Grammars ----

    def prefix(self, prompt: str, tokenizer: Tokenizer, *, has_header: bool) -> str:
        """A Lark grammar of what precedes the `@answer` of a grammar: any number of messages in the channel `analysis`,
        then the header of the final message, unless has_header: the answer's grammar begins with a header itself."""
        opening = _opening(prompt)
        _, is_inside, _ = opening.partition(MESSAGE)
        header = "" if has_header else _header(tokenizer, "final")
        if is_inside and Header.parse(opening.partition(MESSAGE)[0]).kind == "text":
            return ""
        again = f"{mark(tokenizer, START)} {lark_string('assistant')}"
        first = f"rest {again}" if is_inside else ""
        end = mark(tokenizer, END)
        rest = f"rest: TEXT {end}" if end.startswith("<[") else f"rest[lazy]: TEXT {end}"
        return (
            f"start: {first} thought* {header} @answer\n"
            f"thought: {_header(tokenizer, 'analysis')} rest {again}\n{rest}\n{TEXT_RULE}"
        )

    def document_head(self, tokenizer: Tokenizer) -> str:
        """The header of a final message, in a Lark rule."""
        return _header(tokenizer, "final")

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        """One call, with is_parallel too: a call ends the model's turn."""
        return f"start: call\n{_call_rules(tools, tokenizer, all_strict=True)}"

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        rules = _call_rules(tools, tokenizer, all_strict=False)
        again = f"{mark(tokenizer, END)} {mark(tokenizer, START)} {lark_string('assistant')}"
        preamble = f"preamble: {_header(tokenizer, 'commentary')} TEXT {again}\n"
        if not again.startswith("<["):  # as text, the marks could not be told from the preamble
            preamble = 'preamble: ""\n'
        return f"start: preamble* (call | {self.document_head(tokenizer)} TEXT)\n{preamble}{rules}{TEXT_RULE}"

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        def one(call: Mapping[str, Any]) -> str:
            head = f"{CHANNEL}commentary to={FUNCTIONS}{call['name']} {CONSTRAIN}json{MESSAGE}"
            return head + json.dumps(call["arguments"], ensure_ascii=False)

        return f"{CALL}{START}assistant".join(map(one, calls))


def _opening(prompt: str) -> str:
    """What the prompt contains of the message that it leaves open, without its `<|start|>`."""
    _, is_open, opening = prompt.rpartition(START)
    return opening if is_open else "assistant"


def _header(tokenizer: Tokenizer, words: str) -> str:
    return f"{mark(tokenizer, CHANNEL)} {lark_string(words)} {mark(tokenizer, MESSAGE)}"


def _call_rules(tools: Sequence[Tool], tokenizer: Tokenizer, *, all_strict: bool) -> str:
    def head(tool: Tool) -> str:
        channel = f"{mark(tokenizer, CHANNEL)} {lark_string(f'commentary to={FUNCTIONS}{tool.name} ')}"
        return f"{channel} {mark(tokenizer, CONSTRAIN)} {lark_string('json')} {mark(tokenizer, MESSAGE)}"

    return named_call_rules(tools, head, all_strict=all_strict)


# ---- The history ----


def _with_instructions_first(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """System messages at the beginning as one. Later ones become the user's, because the template leaves them out."""
    count = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    texts = [str(message.get("content") or "") for message in messages[:count]]
    first = [{"role": "system", "content": "\n\n".join(filter(None, texts))}] if count else []
    later = [{**one, "role": "user"} if one["role"] == "system" else one for one in messages[count:]]
    return [*first, *later]


def _in_order(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each call as a message of its own, followed by its result."""
    found: list[Mapping[str, Any]] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        if message["role"] == "tool":
            found.append(_result(message))
            continue
        if message["role"] != "assistant":
            found.append(message)
            continue
        calls = message.get("tool_calls") or ()
        if not calls:
            found.append(_with_thinking(message))
            continue
        results = []
        while position < len(messages) and messages[position]["role"] == "tool":
            results.append(messages[position])
            position += 1
        found += _calls_with_results(message, calls, results)
    return found


def _calls_with_results(
    message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    ids = [call.get("id") for call in calls]
    # a result without a known id answers the last call
    named = [one.get("tool_call_id") for one in results]
    owners = [ids.index(call_id) if call_id in ids else len(calls) - 1 for call_id in named]
    for index, call in enumerate(calls):
        said = _with_thinking(message) if index == 0 else {"role": "assistant", "content": ""}
        found.append({**said, "tool_calls": [call]})
        found += [_result(one) for one, owner in zip(results, owners, strict=True) if owner == index]
    return found


def _with_thinking(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning where the template looks for it. Before a call, the template renders `content` as
    reasoning; so text for the user follows the reasoning there, with the header of a message in `commentary`."""
    names = ("thinking", "reasoning_content", "reasoning")
    thinking = next((str(message[name]) for name in names if message.get(name)), "")
    kept = {name: value for name, value in message.items() if name not in names}
    content = kept.get("content")
    if content and kept.get("tool_calls"):
        thinking, kept["content"] = f"{thinking}{END}{START}assistant{CHANNEL}commentary{MESSAGE}{content}", ""
    return {**kept, "thinking": thinking} if thinking else kept


def _result(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": Verbatim(content)} if isinstance(content, str) else message


FORMAT = HarmonyFormat()
