"""Which models may draft for which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.builders import write_tiny_hf_llama
from tinyvllm.config import EngineConfig, SpeculativeConfig
from tinyvllm.engine.drafters import find_draft_files
from tinyvllm.errors import ModelError, TinyvllmError
from tinyvllm.text.tokenizer import load_tokenizer


def test_a_draft_model_has_the_vocabulary_of_the_model(tmp_path: Path) -> None:
    """Another number of reserved special tokens does not matter; another text of a token does."""
    files = write_tiny_hf_llama(tmp_path / "large")
    tokenizer = load_tokenizer(files)
    assert find_draft_files(EngineConfig("large"), files, tokenizer) is None

    def find(name: str) -> str | None:
        config = EngineConfig("large", speculative_config=SpeculativeConfig(model=str(tmp_path / name)))
        found = find_draft_files(config, files, tokenizer)
        return None if found is None else found.name

    write_tiny_hf_llama(tmp_path / "padded", vocab=264)
    assert find("padded") == "padded"

    write_tiny_hf_llama(tmp_path / "foreign")
    path = tmp_path / "foreign" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(TinyvllmError, match=r"draft model foreign .* than large: token 97 is 'b' in foreign .*'a' in"):
        find("foreign")
    with pytest.raises(ModelError, match="missing"):
        find("missing")
