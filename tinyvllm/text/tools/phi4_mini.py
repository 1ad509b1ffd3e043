"""Phi-4-mini: `<|tool_call|>`, a list of calls and `<|/tool_call|>`; or `functools` and a list, which it also writes.

https://huggingface.co/microsoft/Phi-4-mini-instruct (section "Tool-enabled function-calling format")
"""

from __future__ import annotations

from tinyvllm.text.tools.marked_list import MarkedListFormat

FORMAT = MarkedListFormat(
    marks=("<|/tool_call|>", "<|/tool|>"), begins=("<|tool_call|>", "functools"), end="<|/tool_call|>"
)
