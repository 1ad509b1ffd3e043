"""For models without a format of their own: a call is a JSON object, and several calls are a list of objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.text.tools.base import Tool, ToolFormat, call_rules
from tinyvllm.text.tools.events import ToolParser
from tinyvllm.text.tools.llama3 import WORDS_RULE, BareParser

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer


class GenericFormat(ToolFormat):
    marks = ()

    def is_named_in(self, template_source: str) -> bool:
        return True

    def parser(self, tools: Mapping[str, Tool]) -> ToolParser:
        return BareParser(frozenset(tools))

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        several = ' | "[" call (", " call)+ "]"' if is_parallel else ""
        return f"start: call{several}\n{call_rules(tools, 'arguments')}"

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        rules = call_rules(tools, "arguments", all_strict=False)
        return f'start: WORDS? | call | "[" call (", " call)+ "]"\n{WORDS_RULE}{rules}'

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        return json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)


FORMAT = GenericFormat()
