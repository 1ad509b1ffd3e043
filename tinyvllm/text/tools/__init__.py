"""Tool calls as models write them: a file a family, found by name or by the model's chat template."""

from __future__ import annotations

from tinyvllm.errors import TinyvllmError
from tinyvllm.text.tools.base import Tool, ToolFormat
from tinyvllm.text.tools.generic import GenericFormat
from tinyvllm.text.tools.hermes import HermesFormat
from tinyvllm.text.tools.llama3 import Llama3Format
from tinyvllm.text.tools.mistral import MistralFormat

__all__ = ["FORMATS", "Tool", "ToolFormat", "find_tool_format"]

# In the order of asking: whose marks stand in a template. The last takes all.
FORMATS: dict[str, ToolFormat] = {
    format.name: format for format in (MistralFormat(), HermesFormat(), Llama3Format(), GenericFormat())
}


def find_tool_format(name: str | None, template_source: str) -> ToolFormat:
    """The format of that name, else the one whose marks the chat template has, else the generic one."""
    if name is not None:
        if name not in FORMATS:
            raise TinyvllmError(f"--tool-call-parser is {name!r}: choose from {', '.join(FORMATS)}")
        return FORMATS[name]
    return next(format for format in FORMATS.values() if format.is_named_in(template_source))
