"""Real tokenizers and chat templates of families: transformers' ids and chats, and the formats they are recognized by.

Run `bash scripts/fetch_tokenizers.sh` and then `pytest -m tokenizers`. Expected: data/family_reference.json, which
write_family_reference.py makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.text.write_family_reference import CHATS, OUTPUT, TEXTS, digest
from tinyvllm.config import ModelFiles
from tinyvllm.errors import RequestError
from tinyvllm.storage.resolve import models_dir
from tinyvllm.text.chat import end_of_turn_ids, load_chat_template
from tinyvllm.text.reasoning import find_reasoning_format
from tinyvllm.text.tokenizer import load_tokenizer
from tinyvllm.text.tools import FAMILIES, find_tool_format, load_tool_format

pytestmark = [pytest.mark.tokenizers, pytest.mark.timeout(300)]

REFERENCE: dict[str, Any] = json.loads(OUTPUT.read_text(encoding="utf-8"))["families"]
FORMATS = {"llama3_2": "llama3_json", "mistral_nemo": "mistral", "qwen2_5": "hermes", "qwen3": "hermes"}
ENDS = {
    "gemma3": "<end_of_turn>",
    "llama3_2": "<|eot_id|>",
    "mistral_nemo": "</s>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
}


@pytest.fixture(params=REFERENCE)
def files(request: pytest.FixtureRequest) -> ModelFiles:
    path: Path = models_dir() / "tokenizers" / request.param
    if not path.is_dir():
        pytest.fail(f"there is no {path}: run `bash scripts/fetch_tokenizers.sh`", pytrace=False)
    return ModelFiles("hf", path, request.param)


def test_ids_and_chats_are_transformers(files: ModelFiles) -> None:
    expected, tokenizer, template = REFERENCE[files.name], load_tokenizer(files), load_chat_template(files)
    assert tokenizer.eos_id is not None and tokenizer.token_text(tokenizer.eos_id) == expected["eos"]
    for text, ids in zip(TEXTS, expected["texts"], strict=True):
        assert tokenizer.encode(text) == ids, text
    for name, chat in CHATS.items() if template is not None else ():
        variables = {key: value for key, value in chat.items() if key != "messages"} | {"date_string": "26 Jul 2024"}
        assert template is not None
        if expected["chats"][name] is None:
            with pytest.raises(RequestError):
                template.render(chat["messages"], **variables)
            continue
        text = template.render(chat["messages"], **variables)
        assert text == expected["chats"][name]["text"], name
        ids = tokenizer.encode_chat(text)
        assert (len(ids), digest(ids)) == (expected["chats"][name]["num_ids"], expected["chats"][name]["ids"]), name


def test_formats_and_ends_are_found_by_the_template(files: ModelFiles) -> None:
    template, tokenizer = load_chat_template(files), load_tokenizer(files)
    if template is None:
        assert files.name == "gemma2"
        return
    name = FORMATS.get(files.name, "json")
    assert name in FAMILIES and find_tool_format(None, template.source) is load_tool_format(name)
    assert (find_reasoning_format(None, template.source) is not None) == (files.name == "qwen3")
    assert [tokenizer.token_text(one) for one in end_of_turn_ids(template, tokenizer)] == [ENDS[files.name]]
