"""The fenced blocks of docs/CLIENTS.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "CLIENTS.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    section: str  # the nearest heading above it
    language: str
    text: str


def blocks() -> list[Block]:
    found = []
    for section in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0]
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL):
            found.append(Block(heading, language, text))
    return found
