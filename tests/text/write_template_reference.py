"""Write data/template_reference.json: what transformers makes of conversations with the templates of real models.

For each template and conversation: the first digits of the prompt's SHA-256, for prompts in which no text is missing.
The templates themselves are their models' and are not in the repository. With transformers 5.24:

    bash scripts/fetch_tokenizers.sh && python -m tests.text.write_template_reference
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from tests.text.template_chats import CONTINUED, SPECIAL, TOOL, all_chats, date, read_sources, said, texts_of, user

OUTPUT = Path(__file__).parent / "data" / "template_reference.json"
NUM_DIGITS = 10


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:NUM_DIGITS]


class FixedDate:
    @classmethod
    def now(cls) -> FixedDate:
        return cls()

    def strftime(self, date_format: str) -> str:
        return date(date_format)


def render(source: str, chat: list[dict[str, Any]], has_tools: bool = False, **options: Any) -> str | None:
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = FixedDate  # what strftime_now asks
    tools: Any = [TOOL] if has_tools else None
    variables = {"tools": tools, "chat_template": source, **SPECIAL, **options}
    try:
        [text], _ = chat_template_utils.render_jinja_template([copy.deepcopy(chat)], **variables)
    except Exception:
        return None
    return str(text)


def reference(source: str) -> dict[str, str]:
    found = {}
    for name, chat, has_tools in all_chats():
        text = render(source, chat, has_tools)
        wanted = [*texts_of(chat), *(["get_weather", "where"] if has_tools else [])]
        if text is not None and all(one in text for one in wanted):
            found[name] = digest(text)
    for content in CONTINUED:
        text = render(source, [user("Usr0"), said(content)], continue_final_message=True)
        if text is not None:
            found[f"continued: {content}"] = digest(text)
    return found


def main() -> None:
    import os

    models = Path(os.environ.get("TINYVLLM_MODELS", "models"))
    written = {}
    for name, source in read_sources(models).items():
        written[name] = {"sha256": hashlib.sha256(source.encode()).hexdigest(), "prompts": reference(source)}
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in written.items()]
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
