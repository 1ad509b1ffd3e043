"""Real tokenizers and chat templates of families: transformers' ids and chats, and the formats they are recognized by.

Run `bash scripts/fetch_tokenizers.sh` and then `pytest -m tokenizers`. Expected: data/family_reference.json, which
write_family_reference.py makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.text.harmony import encode
from tests.text.write_family_reference import CHATS, OUTPUT, TEXTS, dated, digest
from tests.text.write_harmony_reference import CHATS as HARMONY_CHATS
from tests.text.write_harmony_reference import FORMED
from tests.text.write_harmony_reference import OUTPUT as HARMONY_OUTPUT
from tinyvllm.config import ModelFiles
from tinyvllm.storage.resolve import models_dir
from tinyvllm.text.chat import ChatTemplate, end_of_turn_ids, load_chat_template
from tinyvllm.text.gguf_tokenizer import read_gguf_tokenizer
from tinyvllm.text.reasoning import find_reasoning_format
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer
from tinyvllm.text.tools import FAMILIES, find_tool_format, harmony, load_tool_format

pytestmark = [pytest.mark.tokenizers, pytest.mark.timeout(300)]

WRITTEN = json.loads(OUTPUT.read_text(encoding="utf-8"))
REFERENCE: dict[str, Any] = WRITTEN["families"]
FORMATS = {
    "llama3_2": "llama3_json",
    "mistral_nemo": "mistral",
    "qwen2_5": "hermes",
    "qwen3": "hermes",
    "qwen3_5": "qwen3_coder",
    "qwen3_coder": "qwen3_coder",
    "glm4_7": "glm45",
    "gpt_oss": "harmony",
}
THINKERS = ("qwen3", "qwen3_5", "glm4_7", "gpt_oss")
ENDS = {
    "gemma3": ["<end_of_turn>"],
    "llama3_2": ["<|eot_id|>"],
    "mistral_nemo": ["</s>"],
    "qwen2_5": ["<|im_end|>"],
    "qwen3": ["<|im_end|>"],
    "gpt_oss": ["<|return|>", "<|call|>"],
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
        text = dated(template.render(chat["messages"], **variables))
        if "tools" in chat and not template.renders_tools():  # Gemma 3's ignores them, and refuses results
            contents = [message["content"] for message in chat["messages"]]
            assert all(one in text for one in ("You can call functions.", "get_weather", *contents)), name
            continue
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
    assert (find_reasoning_format(None, template.source) is not None) == (files.name in THINKERS)
    assert [tokenizer.token_text(one) for one in end_of_turn_ids(template, tokenizer)] == ENDS[files.name]


@pytest.mark.parametrize("name", WRITTEN["templates"])
def test_templates_without_tokenizers_are_rendered_as_by_transformers(name: str) -> None:
    template = template_of(name)
    for chat_name, chat in CHATS.items():
        variables = {key: value for key, value in chat.items() if key != "messages"}
        assert dated(template.render(chat["messages"], **variables)) == WRITTEN["templates"][name][chat_name], chat_name
    assert find_tool_format(None, template.source) is load_tool_format(FORMATS[name])
    reasoning = find_reasoning_format(None, template.source)
    assert (reasoning is not None) == (name in THINKERS)
    if reasoning is not None:  # their prompts open the reasoning, unless it is disabled
        assert reasoning.starts_inside(WRITTEN["templates"][name]["tools"])
        assert not reasoning.starts_inside(WRITTEN["templates"][name]["no thinking"])


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_coder", "glm4_7"])
def test_calls_are_written_as_by_the_template(name: str) -> None:
    [call] = CHATS["results"]["messages"][1]["tool_calls"]
    assert load_tool_format(FORMATS[name]).write([call["function"]]) in WRITTEN["templates"][name]["results"]


def template_of(name: str) -> ChatTemplate:
    path = models_dir() / "tokenizers" / name / "chat_template.jinja"
    if not path.is_file():
        pytest.fail(f"there is no {path}: run `bash scripts/fetch_tokenizers.sh`", pytrace=False)
    return ChatTemplate({"default": path.read_text(encoding="utf-8")}, {}, name)


def test_gpt_oss_ids_and_prompts_are_the_librarys() -> None:
    """Where the template deviates, it is followed: it has a comma after the comment with a default."""
    reference = json.loads(HARMONY_OUTPUT.read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(ModelFiles("hf", models_dir() / "tokenizers" / "gpt_oss", "gpt_oss"))
    assert [encode(tokenizer, text) for text in FORMED] == reference["ids"]
    assert tokenizer.encode_chat("<|return|><|call|>") == reference["ends"]
    for name, chat in HARMONY_CHATS.items():
        system = [{"role": "system", "content": chat["instructions"]}] if "instructions" in chat else []
        said = [one for one in chat["messages"] if one["role"] != "system"]
        messages = harmony.FORMAT.prepare([*system, *said], [], has_template=True)
        variables = {"reasoning_effort": chat.get("effort", "medium")}
        if "identity" in chat:
            variables |= {"model_identity": chat["identity"], "builtin_tools": ["browser", "python"]}
        text = template_of("gpt_oss").render(messages, tools=chat.get("tools"), **variables)
        assert dated(text).replace("default: C,", "default: C") == reference["chats"][name], name


def test_gpt_oss_as_gguf_has_the_same_ids() -> None:
    """What llama.cpp's converter writes of its tokenizer.json: the pre-tokenizer gpt-4o, and unused ids at the end."""
    path = models_dir() / "tokenizers" / "gpt_oss" / "tokenizer.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    special = {token["id"]: token["content"] for token in written["added_tokens"]}
    texts = {token_id: text for text, token_id in written["model"]["vocab"].items()} | special
    size = 201_088
    metadata = {
        "model": "gpt2",
        "pre": "gpt-4o",
        "tokens": [texts.get(token_id, f"[PAD{token_id}]") for token_id in range(size)],
        "token_type": [3 if token_id in special else 1 if token_id in texts else 5 for token_id in range(size)],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in written["model"]["merges"]],
        "bos_token_id": 199_998,
        "eos_token_id": 200_002,
    }
    tokenizer = Tokenizer(read_gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}))
    reference = json.loads(HARMONY_OUTPUT.read_text(encoding="utf-8"))
    assert [encode(tokenizer, text) for text in FORMED] == reference["ids"]
    assert [tokenizer.encode(text) for text in TEXTS] == REFERENCE["gpt_oss"]["texts"]
    assert tokenizer.eos_ids >= {*reference["ends"]} and tokenizer.encode_chat("<|end|>")[0] not in tokenizer.eos_ids
