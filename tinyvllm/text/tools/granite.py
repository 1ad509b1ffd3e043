"""Granite 3: `<|tool_call|>` (3.0) or `<tool_call>` (3.1) and a list of calls.

https://huggingface.co/ibm-granite/granite-3.3-8b-instruct (its system prompt for tools)
"""

from __future__ import annotations

from tinyvllm.text.tools.marked_list import MarkedListFormat

FORMAT = MarkedListFormat(marks=("<|tool_call|>",), begins=("<|tool_call|>", "<tool_call>"))
