"""Mistral's models since Mistral Small 3.1 (Ministral 3, Devstral, Magistral): `[TOOL_CALLS]name[ARGS]{...}` for each
call.

https://github.com/mistralai/mistral-common (tokens/tokenizers/instruct.py, InstructTokenizerV11)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.text.grammar import lark_string
from tinyvllm.text.tools.base import TEXT_RULE, Tool, mark, marked_head, named_call_rules
from tinyvllm.text.tools.mistral import ARGS, CALLS, MistralFormat

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer


class MistralArgsFormat(MistralFormat):
    marks = (ARGS,)

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        calls = mark(tokenizer, CALLS)
        more = f" ({calls} call)*" if is_parallel else ""
        return f"start: {calls} call{more}\n{_call_rules(tools, tokenizer, all_strict=True)}"

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        calls = mark(tokenizer, CALLS)
        rules = _call_rules(tools, tokenizer, all_strict=False)
        return f"start: TEXT | head call ({calls} call)*\n{marked_head(calls)}{TEXT_RULE}{rules}"

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        return "".join(
            f"{CALLS}{call['name']}{ARGS}{json.dumps(call['arguments'], ensure_ascii=False)}" for call in calls
        )


def _call_rules(tools: Sequence[Tool], tokenizer: Tokenizer, *, all_strict: bool) -> str:
    arguments = mark(tokenizer, ARGS)
    return named_call_rules(tools, lambda tool: f"{lark_string(tool.name)} {arguments}", all_strict=all_strict)


FORMAT = MistralArgsFormat()
