"""The HTTP flags of `tinyvllm serve`, as settings."""

from __future__ import annotations

import pytest

from tinyvllm.cli.server_flags import ServerFlags, read_apis
from tinyvllm.config import EngineConfig
from tinyvllm.errors import TinyvllmError


def test_all_apis_are_on_by_default() -> None:
    assert ServerFlags().settings(local_host=None).apis == ("openai", "anthropic", "ollama")
    assert ServerFlags(api="ollama").settings(local_host=None).apis == ("ollama",)


def test_api_names_are_a_list_in_any_order() -> None:
    assert read_apis(" Ollama,openai,ollama,") == ("openai", "ollama")


@pytest.mark.parametrize("given", ["", ",", "openai,gemini", "none"])
def test_an_unknown_api_is_refused_with_the_known_ones(given: str) -> None:
    with pytest.raises(TinyvllmError, match="openai, anthropic, ollama"):
        read_apis(given)


def test_adapters_may_be_loaded_only_where_a_model_takes_some() -> None:
    off, on = EngineConfig("a"), EngineConfig("b", enable_lora=True)
    ServerFlags().check_adapters([off])
    ServerFlags(allow_runtime_lora=True).check_adapters([off, on])
    with pytest.raises(TinyvllmError, match="adapters are off: give --enable-lora"):
        ServerFlags(allow_runtime_lora=True).check_adapters([off])
