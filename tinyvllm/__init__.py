"""tinyvllm: an LLM serving engine on tinygrad. These are the public names; everything else may change.

>>> from tinyvllm import LLM, SamplingParams
>>> LLM("smollm2-135m-instruct").generate("The sky is", SamplingParams(max_tokens=32))[0].outputs[0].text
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyvllm.config import EngineConfig, LoRARequest, SamplingParams
    from tinyvllm.engine.llm import LLM

    __version__: str

__all__ = ["LLM", "EngineConfig", "LoRARequest", "SamplingParams", "__version__"]

_MODULES = {
    "LLM": "tinyvllm.engine.llm",
    "EngineConfig": "tinyvllm.config",
    "LoRARequest": "tinyvllm.config",
    "SamplingParams": "tinyvllm.config",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import tinyvllm` is instant and opens no device."""
    if name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    elif name == "__version__":
        value = _read_version()
    else:
        raise AttributeError(f"module 'tinyvllm' has no attribute {name!r}: it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def _read_version() -> str:
    """The installed package's version, which is defined in pyproject.toml only."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tinyvllm")
    except PackageNotFoundError:  # a checkout on the path that is not installed
        return "0+unknown"
