from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.builders import CHATML, write_json
from tests.text.vocabularies import make_byte_level
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, RequestError
from tinyvllm.text import chat
from tinyvllm.text.chat import ChatTemplate, end_of_turn_ids, load_chat_template
from tinyvllm.text.tokenizer import load_tokenizer

HI = [{"role": "user", "content": "hi"}]


def make_template(source: str, **others: str) -> ChatTemplate:
    return ChatTemplate({"default": source, **others}, {"bos_token": "<s>", "eos_token": "</s>"}, "tiny")


def render(source: str, messages: list[dict[str, Any]] | None = None, **kwargs: Any) -> str:
    return make_template(source).render(HI if messages is None else messages, **kwargs)


# --- Where templates come from ----------------------------------------------------------------------------


def load(directory: Path, override_path: Path | None = None) -> str:
    template = load_chat_template(ModelFiles("hf", directory, "tiny"), override_path)
    return "none" if template is None else template.render(HI)


def test_sources_are_tried_in_order(tmp_path: Path) -> None:
    assert load(tmp_path) == "none"
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "config"})
    assert load(tmp_path) == "config"
    (tmp_path / "chat_template.jinja").write_text("jinja", encoding="utf-8")
    assert load(tmp_path) == "jinja"
    (tmp_path / "mine.jinja").write_text("mine", encoding="utf-8")
    assert load(tmp_path, tmp_path / "mine.jinja") == "mine"


def test_named_templates_serve_chats_with_and_without_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    template = load_chat_template(ModelFiles("hf", tmp_path, "tiny"))
    assert template is not None
    assert template.render(HI) == "plain"
    assert template.render(HI, tools=[{"type": "function"}]) == "tools 1"


def test_missing_default_template_is_the_callers_to_replace() -> None:
    template = ChatTemplate({"rag": "x"}, {}, "tiny")
    with pytest.raises(RequestError, match=r"no version named 'default' \(it has rag\).*--chat-template"):
        template.render(HI)


def test_both_formats_of_a_model_render_the_same(tiny_hf_files: ModelFiles, tiny_gguf_files: ModelFiles) -> None:
    for files in (tiny_hf_files, tiny_gguf_files):
        template = load_chat_template(files)
        assert template is not None
        assert template.sources == {"default": CHATML}
        assert template.render(HI) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.model
def test_default_model_renders_its_own_format(smollm2_files: ModelFiles) -> None:
    template, tokenizer = load_chat_template(smollm2_files), load_tokenizer(smollm2_files)
    assert template is not None
    text = template.render(HI)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert text == (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode_chat(text).count(1) == 3


def test_unreadable_template_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent.jinja cannot be read"):
        load(tmp_path, tmp_path / "absent.jinja")


def test_template_that_does_not_parse_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match=r"'default' of tiny, line 2: it does not parse"):
        make_template("\n{% if %}")


# --- What templates can do --------------------------------------------------------------------------------


def test_blocks_leave_no_lines_behind() -> None:
    assert render("{% if true %}\n  {% set x = 1 %}\n{{ x }}\n{% endif %}\n") == "1\n"


def test_special_tokens_and_further_variables_are_known() -> None:
    assert render("{{ bos_token }}{{ x }}{{ eos_token }}", x="y") == "<s>y</s>"
    assert render("{{ unk_token is defined }}") == "False"


def test_generation_prompt_is_the_callers_choice() -> None:
    assert render("{{ add_generation_prompt }}") == "True"
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"


def test_json_is_written_as_models_saw_it() -> None:
    assert render("{{ tools | tojson }}", tools=[{"a": "<é日>"}]) == '[{"a": "<é日>"}]'
    assert render("{{ tools | tojson(indent=1) }}", tools=[{"a": 1}]) == '[\n {\n  "a": 1\n }\n]'


def test_loops_can_break_and_continue() -> None:
    source = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    assert render(source) == "023"


def test_generation_marks_are_passed_over() -> None:
    assert render("a{% generation %}{% set x = 1 %}b{{ x }}{% endgeneration %}{{ x is defined }}") == "ab1False"


def test_date_is_known() -> None:
    assert re.fullmatch(r"\d\d [A-Z]\w\w \d{4}", render("{{ strftime_now('%d %b %Y') }}"))


# --- Messages ---------------------------------------------------------------------------------------------

CONTENT = "{% for m in messages %}[{{ m['content'] + '' }}]{% endfor %}"


def test_text_parts_become_one_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        {"role": "user", "content": []},
        {"role": "user", "content": None},
    ]
    assert render(CONTENT, [*messages, {"role": "assistant"}]) == "[a\nb][][][]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], r"messages\[1\].content has a part of type 'image_url'"),
        ([{"type": "text"}], r"part of type 'text'"),
        (["bare"], r"part of type 'str'"),
        (5, r"messages\[1\].content is a int"),
    ],
)
def test_content_that_is_no_text_is_refused(content: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        render(CONTENT, [*HI, {"role": "user", "content": content}])
    assert caught.value.param == "messages"


def test_callers_messages_are_left_alone() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    render(CONTENT, messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


# --- Failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].absent.name }}", "absent"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_failing_template_refuses_the_messages(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"(?s)chat template rejected the messages.*{message}") as caught:
        render(source)
    assert caught.value.param == "messages"


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_CHAT_CHARS", 1000)
    with pytest.raises(RequestError, match="more than 1000 characters"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}")


# --- Ends of turns ------------------------------------------------------------------------------------------


def end_texts(source: str, **special: Any) -> list[str]:
    tokenizer = make_byte_level(**special)
    return [tokenizer.token_text(token_id) for token_id in end_of_turn_ids(make_template(source), tokenizer)]


def test_the_special_token_after_an_answer_ends_turns() -> None:
    assert end_texts(CHATML) == ["<|im_end|>"]
    turns = "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m.content }} <|endoftext|>\n{% endfor %}"
    assert end_texts(turns) == ["<|endoftext|>"]


def test_templates_without_such_a_token_end_nothing() -> None:
    assert end_texts("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}") == []
    assert end_texts("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}") == []  # BOS
    assert end_texts("{{ raise_exception('no') }}") == []
    assert end_texts("fixed") == []


def test_harmony_ends_messages_not_turns_with_what_follows_an_answer() -> None:
    assert end_texts(CHATML + "{# <|return|> ends a turn #}") == []
