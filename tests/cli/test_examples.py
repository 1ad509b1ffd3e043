"""The examples in --help, and what the program says to those who mistype."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tinyvllm.cli.commands import COMMANDS, app
from tinyvllm.cli.examples import EXAMPLES


def test_every_command_has_examples_that_parse() -> None:
    assert list(EXAMPLES) == list(COMMANDS)
    group: Any = get_command(app)
    for examples in EXAMPLES.values():
        for line, _ in examples:
            program, command, *arguments = shlex.split(line.partition(" < ")[0])
            assert program == "tinyvllm"
            group.commands[command].make_context(command, arguments)  # raises for what is unknown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_them(name: str) -> None:
    shown = CliRunner().invoke(app, [name.replace("_", "-"), "--help"]).stdout
    assert all(line in shown for line, _ in EXAMPLES[name])


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"]])
def test_the_list_of_commands_cuts_off_no_sentence(arguments: list[str]) -> None:
    """In a terminal of 80 columns, as tests have it."""
    shown = CliRunner().invoke(app, arguments).stdout
    assert "..." not in shown.partition("Commands:")[2]


def test_typos_are_answered_with_what_was_meant() -> None:
    assert "Did you mean 'generate'?" in CliRunner().invoke(app, ["genrate"]).stderr
    assert "--prompt" in CliRunner().invoke(app, ["generate", "--promt", "x"]).stderr
    assert "did you mean 'smollm2-135m-instruct'?" in CliRunner().invoke(app, ["chat", "smollm2-135m-instuct"]).stderr
    assert "tinyvllm chat" in CliRunner().invoke(app, []).output
