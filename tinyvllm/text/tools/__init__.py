"""The formats of tool calls: one file per family of models, selected by name or by the model's chat template."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tinyvllm.errors import TinyvllmError

if TYPE_CHECKING:
    from tinyvllm.text.tools.base import ToolFormat

# The names for --tool-call-parser, and the module of each, which defines FORMAT. Chat templates are searched for their
# marks in this order; the last format matches every template. Names, so that --help can list them without imports.
FAMILIES = {
    "harmony": "harmony",
    "mistral_args": "mistral_args",
    "mistral": "mistral",
    "gemma4": "gemma4",
    "phi4_mini_json": "phi4_mini",
    "granite": "granite",
    "olmo3": "olmo3",
    "qwen3_coder": "qwen3_coder",
    "glm45": "glm45",
    "hermes": "hermes",
    "glm4": "glm4",
    "llama3_json": "llama3",
    "json": "generic",
}
# other names of vLLM's
ALIASES = {"openai": "harmony", "qwen3_xml": "qwen3_coder", "glm47": "glm45"}


def load_tool_format(name: str) -> ToolFormat:
    """The format of that name, which must be a key of FAMILIES."""
    module = importlib.import_module(f"{__name__}.{FAMILIES[name]}")
    found: ToolFormat = module.FORMAT
    return found


def find_tool_format(name: str | None, template_source: str) -> ToolFormat:
    """The format of that name, else the first whose marks are in the chat template, else the generic one.

    Raises TinyvllmError for an unknown name."""
    if name is not None:
        known = ALIASES.get(name, name)
        if known not in FAMILIES:
            names = ", ".join([*FAMILIES, *ALIASES])
            raise TinyvllmError(f"--tool-call-parser is {name!r}: choose from {names}")
        return load_tool_format(known)
    return next(found for found in map(load_tool_format, FAMILIES) if found.is_named_in(template_source))
