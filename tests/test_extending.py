"""docs/EXTENDING.md: its examples run in the order of the page, and what they register is gone afterwards.

A Python block whose first line is a comment with a path is a file: it becomes a module of that name, not on disk. The
other blocks of a section run one after another in one namespace.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (tinyvllm/[\w/]+)\.py\n")

# The tables that examples add to, (module, name): each section works on copies of them.
TABLES = (
    ("tinyvllm.cli.commands", "COMMANDS"),
    ("tinyvllm.device.kinds", "KINDS"),
    ("tinyvllm.model.registry", "FAMILIES"),
    ("tinyvllm.model.weights.hf_formats", "METHODS"),
    ("tinyvllm.model.weights.quant", "QUANTIZED_KINDS"),
    ("tinyvllm.ops.activation", "ACTIVATIONS"),
    ("tinyvllm.ops.sampling.logits_processing", "FILTERS"),
    ("tinyvllm.ops.step_inputs", "PROCESSING_FLOATS"),
    ("tinyvllm.server.routes", "ROUTES"),
    ("tinyvllm.storage.families", "KNOWN_ARCHITECTURES"),
    ("tinyvllm.text.reasoning", "FORMATS"),
    ("tinyvllm.text.tools", "FAMILIES"),
)
WITHOUT_TABLE = {"A habit of chat templates"}  # a habit is found by rendering: nothing is registered


def read_sections() -> dict[str, list[str]]:
    """The Python blocks by heading, of the sections that have any."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)[1:]
    blocks = {title: _BLOCK.findall(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}
    return {title: found for title, found in blocks.items() if found}


SECTIONS = read_sections()


def read_tables() -> dict[str, Any]:
    return {f"{module}.{name}": copy.copy(getattr(importlib.import_module(module), name)) for module, name in TABLES}


@contextlib.contextmanager
def copied_tables() -> Iterator[None]:
    """Replace the tables by copies inside the block. The modules that examples made go with the copies."""
    made = {path.replace("/", ".") for blocks in SECTIONS.values() for path in map(file_of, blocks) if path}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in TABLES:
            owner = importlib.import_module(module)
            patch.setattr(owner, name, copy.copy(getattr(owner, name)))
        try:
            yield
        finally:
            for name in made & set(sys.modules):
                del sys.modules[name]


def file_of(code: str) -> str | None:
    """The path of the file that a block stands for, without its suffix; None if it is not a file."""
    match = _FILE.match(code)
    return None if match is None else match[1]


def run_example(title: str) -> None:
    namespace: dict[str, Any] = {"__name__": title}
    for number, code in enumerate(SECTIONS[title], 1):
        program = compile(code, f"docs/EXTENDING.md: {title}, block {number}", "exec")
        path = file_of(code)
        if path is None:
            exec(program, namespace)
            continue
        assert not (ROOT / f"{path}.py").exists(), f"{path}.py exists: give the example another name"
        name = path.replace("/", ".")
        module = sys.modules[name] = ModuleType(name)
        exec(program, module.__dict__)


@pytest.mark.parametrize("title", SECTIONS)
def test_the_example_works_and_leaves_nothing_registered(title: str) -> None:
    before = read_tables()
    with copied_tables():
        run_example(title)
        assert (read_tables() != before) == (title not in WITHOUT_TABLE), "the example registers nothing"
    assert read_tables() == before


def test_every_section_says_which_tests_must_pass() -> None:
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)[1:]
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
        assert named, title
        for path, test in named:
            assert (ROOT / path).exists(), path
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8") or not test, (path, test)
