"""Write data/template_abilities.json: what is found out about the templates of real models, but for the defaults.

bash scripts/fetch_tokenizers.sh && python -m tests.text.write_template_abilities
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from tests.text.template_chats import SPECIAL, read_sources
from tinyvllm.storage.resolve import models_dir
from tinyvllm.text.chat import ChatTemplate
from tinyvllm.text.template_abilities import Abilities

OUTPUT = Path(__file__).parent / "data" / "template_abilities.json"


@functools.cache
def load_templates() -> dict[str, ChatTemplate]:
    sources = read_sources(models_dir())
    return {name: ChatTemplate({"default": source}, SPECIAL, name) for name, source in sources.items()}


def deviations(template: ChatTemplate, *, has_tools: bool) -> dict[str, Any]:
    found = dataclasses.asdict(template.abilities(has_tools=has_tools))
    default = dataclasses.asdict(Abilities(is_known=True))
    return {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in found.items()
        if value != default[name]
    }


def main() -> None:
    lines = []
    for name, template in load_templates().items():
        entry = {kind: deviations(template, has_tools=kind == "tools") for kind in ("chat", "tools")}
        lines.append(f"{json.dumps(name)}: {json.dumps(entry)}")
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
