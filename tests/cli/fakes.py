"""The command line with an engine that types a given reply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.server.fake_engine import FakeEngine
from tinyvllm.cli import engine as engines
from tinyvllm.cli.commands import app
from tinyvllm.cli.terminal import Progress
from tinyvllm.config import EngineConfig


class Terminal:
    """Runs commands with `engine` in place of a real one. Records the settings of each start."""

    def __init__(self, engine: FakeEngine, model: Path) -> None:
        self.engine = engine
        self.model = str(model)
        self.configs: list[EngineConfig] = []

    def start_engine(self, config: EngineConfig, progress: Progress) -> Any:
        self.configs.append(config)
        for stage, total in (("load", 3), ("warm-up", 2)):
            for done in range(total + 1):
                progress(stage, done, total)
        return self.engine

    def run(self, command: str, *arguments: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(app, [command, self.model, *arguments], input=stdin)


def make_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **engine: Any) -> Terminal:
    model = tmp_path / "tiny.gguf"
    model.write_bytes(b"GGUF")
    terminal = Terminal(FakeEngine(**engine), model)
    monkeypatch.setattr(engines, "start_engine", terminal.start_engine)
    return terminal
