"""A chat template and a tokenizer in the harmony format, for tests."""

from __future__ import annotations

import re

from tests.builders import byte_vocabulary, is_special
from tests.text.vocabularies import make_byte_level
from tests.text.write_harmony_reference import MARKS
from tinyvllm.text.detokenizer import SPECIAL_MARK
from tinyvllm.text.tokenizer import Tokenizer

# What gpt-oss's own template makes of messages, in short; without the descriptions of tools
TEMPLATE = """
{%- macro message(header, content, end='<|end|>') -%}
  <|start|>{{ header }}<|message|>{{ content }}{{ end }}
{%- endmacro -%}
{%- macro described(tools) -%}
  {%- for tool in tools %}{{ tool.function.name }}({{ tool.function.parameters.properties|join }}){% endfor -%}
{%- endmacro -%}
{{- message('system', strftime_now('%Y-%m-%d') ~ ' Reasoning: ' ~ (reasoning_effort or 'medium')) }}
{%- set first = messages[0].role == 'system' %}
{%- if first or tools -%}
  {{- message('developer', (messages[0].content if first else '') ~ described(tools or [])) }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for one in messages[first|int:] %}
  {%- if one.tool_calls %}
    {%- set call = one.tool_calls[0].function %}
    {%- set last.name = call.name %}
    {%- set later = messages[loop.index + first|int:]|selectattr('role', 'eq', 'assistant') %}
    {%- if one.content and one.thinking %}{{ raise_exception('both') }}{% endif %}
    {%- if one.thinking and not later|rejectattr('tool_calls')|list %}
      {{- message('assistant<|channel|>analysis', one.thinking) }}
    {%- endif %}
    {%- set header = 'assistant to=functions.' ~ call.name ~ '<|channel|>commentary json' %}
    {{- message(header, call.arguments|tojson, '<|call|>') }}
  {%- elif one.role == 'assistant' %}
    {{- message('assistant<|channel|>final', one.content, '<|end|>' if add_generation_prompt else '<|return|>') }}
  {%- elif one.role == 'tool' %}
    {{- message('functions.' ~ last.name ~ ' to=assistant<|channel|>commentary', one.content|tojson) }}
  {%- elif one.role == 'user' %}{{ message('user', one.content) }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""


def written(text: str) -> str:
    """`text` of the reference as a detokenizer writes it for the parser."""
    return re.sub(r"«(\w+)»", rf"{SPECIAL_MARK}<|\1|>", text)


def make_tokenizer() -> Tokenizer:
    """One token a byte, and harmony's special tokens."""
    tokens = [*byte_vocabulary(), *(f"<|{name}|>" for name in MARKS)]
    count = len(byte_vocabulary())
    types = [3 if is_special(index) or index >= count else 1 for index in range(len(tokens))]
    return make_byte_level(tokens=tokens, token_type=types)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text` of the reference."""
    ids: list[int] = []
    for piece in re.split(r"(«\w+»)", text):
        if piece.startswith("«"):
            ids += tokenizer.encode_chat(f"<|{piece[1:-1]}|>")
        elif piece:
            ids += tokenizer.encode(piece, add_special_tokens=False, parse_special=False)
    return ids
