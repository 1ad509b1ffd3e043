"""--speculative-config: what it accepts, and errors that name the key, its value, the limit and the remedy."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tinyvllm.cli.flags import EngineFlags
from tinyvllm.config import EngineConfig, SpeculativeConfig
from tinyvllm.errors import TinyvllmError


def test_the_flag_becomes_a_setting_and_reaches_other_processes() -> None:
    text = '{"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 3}'
    config = EngineFlags(speculative_config=text).make_config("m")
    expected = SpeculativeConfig(method="ngram", num_speculative_tokens=6, prompt_lookup_max=3)
    assert config.speculative_config == expected and expected.lookup == (2, 3)
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(config)), EngineConfig) == config
    assert EngineConfig("m").speculative_config is None


@pytest.mark.parametrize(
    ("given", "method", "num_tokens"),
    [
        ({}, "ngram", 8),
        ({"model": "[ngram]"}, "ngram", 8),
        ({"model": "small"}, "draft_model", 4),
        ({"method": "mtp", "num_speculative_tokens": 1}, "mtp", 1),
    ],
)
def test_the_method_may_be_left_out(given: dict[str, Any], method: str, num_tokens: int) -> None:
    config = SpeculativeConfig.of(given)
    assert (config.method, config.num_drafts) == (method, num_tokens)


def test_one_length_of_n_grams_adapts_the_other() -> None:
    lengths = [SpeculativeConfig.of(given).lookup for given in ({"prompt_lookup_max": 1}, {"prompt_lookup_min": 6}, {})]
    assert lengths == [(1, 1), (6, 6), (2, 4)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[" * 100_000, r"--speculative-config is not JSON .*recursion.*: give an object such as"),
        ("{", r"--speculative-config is not JSON .*: give an object such as"),
        ("[1]", r"--speculative-config is \[1\]: give an object of keys and values"),
        ({"num_tokens": 1}, r"has no key 'num_tokens': it has method, num_speculative_tokens, model"),
        ({"method": "eagle"}, r"has method 'eagle': choose one of ngram, draft_model, mtp"),
        ({"num_speculative_tokens": 99}, r"has num_speculative_tokens 99: give between 1 and 32"),
        ({"num_speculative_tokens": "8"}, r"has num_speculative_tokens '8': give a whole number"),
        ({"method": "draft_model"}, r"has model None: method draft_model needs a draft model"),
        ({"method": "ngram", "model": "a"}, r"has model 'a': method ngram has no draft model: leave it out"),
        ({"method": "mtp", "prompt_lookup_max": 3}, r"has prompt_lookup_max 3: only method ngram"),
        ({"prompt_lookup_max": 3, "prompt_lookup_min": 4}, r"has prompt_lookup_min 4: give at most prompt_lookup_max"),
        ({"disable_by_batch_size": 0}, r"has disable_by_batch_size 0: give at least 2"),
        ({"adaptive": 1}, r"has adaptive 1: give true or false"),
    ],
)
def test_a_bad_value_is_named(given: Any, message: str) -> None:
    with pytest.raises(TinyvllmError, match=message):
        EngineConfig("m", speculative_config=given)
