"""Qwen3-Coder, Qwen3-Next's coder, Qwen3.5 and later: `<function=name>` and `<parameter=key>` inside `<tool_call>`.

https://huggingface.co/Qwen/Qwen3-Coder-30B-A3B-Instruct (its chat template)
"""

from __future__ import annotations

from tinyvllm.text.tools.tagged import TaggedFormat, Tags


class Qwen3CoderFormat(TaggedFormat):
    marks = ("<parameter=",)
    tags = Tags(
        name_begin="<function=",
        name_end=">",
        key_begin="<parameter=",
        key_end=">",
        value_end="</parameter>",
        call_end="</function>",
        line="\n",
    )


FORMAT = Qwen3CoderFormat()
