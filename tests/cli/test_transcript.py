"""Conversations in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyvllm.cli import transcript
from tinyvllm.errors import TinyvllmError

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi — ö"},
    {"role": "assistant", "content": "Fine.\n", "reasoning_content": "Hm.\n\nYes."},
]


def test_json_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    path = transcript.save(str(tmp_path / "a.json"), "tiny", MESSAGES)
    assert path == tmp_path / "a.json" and transcript.load(str(path)) == MESSAGES
    assert list(tmp_path.iterdir()) == [path]


def test_markdown_is_for_reading(tmp_path: Path) -> None:
    path = transcript.save(str(tmp_path / "a.md"), "tiny", MESSAGES)
    assert path.read_text() == (
        "# A conversation with tiny\n\n## System\n\nBe kind.\n\n## User\n\nHi — ö\n\n"
        "## Assistant\n\n> Hm.\n>\n> Yes.\n\nFine.\n"
    )


@pytest.mark.parametrize("name", ["a.txt", "a", "no/such/a.json"])
def test_what_cannot_be_saved_is_told_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(TinyvllmError, match=r"a"):
        transcript.save(str(tmp_path / name), "tiny", MESSAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[{"role": "robot", "content": "x"}]', '[{"role": "user"}]'])
def test_what_is_no_conversation_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(TinyvllmError, match=r"a\.json"):
        transcript.load(str(path))
