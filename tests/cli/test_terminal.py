"""`generate` and `chat` on a terminal: what the screen and its scrollback show at the end."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.cli.screen import Screen, Tty
from tinyvllm.cli import terminal
from tinyvllm.cli.answer_view import MarkdownView
from tinyvllm.cli.markdown import split_blocks

ROOT = Path(__file__).parents[2]
# An engine that answers with the text of $REPLY. It hangs after $HANG characters.
PROGRAM = """
import os, time
from tests.server.fake_engine import FakeEngine
from tinyvllm.cli import engine as engines, main

def start_engine(config, progress):
    for done in range(3):
        progress("warm-up", done, 2)
    hang = os.environ.get("HANG")
    return FakeEngine(reply=os.environ["REPLY"], hang_after=hang and int(hang), max_model_len=9999)

engines.start_engine = start_engine
main()
"""
ANSWER = """# Rivers

Three **long** rivers, one of which has a name that needs a second line of the terminal:
the second line

1. Nile
2. Amazon

```python
print("a line of code that is much longer than the eighty columns which the terminal of this test has")
```

A <div> stays.
"""
SHOWN = """Rivers

Three long rivers, one of which has a name that needs a second line of the
terminal:
the second line

 1. Nile
 2. Amazon

```python
print("a line of code that is much longer than the eighty columns which the term
inal of this test has")
```

A <div> stays.
"""


def open_tty(tmp_path: Path, *arguments: str, reply: str = ANSWER, **environment: str) -> Tty:
    model = tmp_path / "tiny.gguf"
    model.write_bytes(b"GGUF")
    environment = {"REPLY": reply, "PYTHONPATH": str(ROOT), "TINYVLLM_CACHE": str(tmp_path), **environment}
    return Tty([arguments[0], str(model), *arguments[1:]], environment, PROGRAM)


# ---- Markdown ----


def show(source: str, size: int, height: int = 24) -> tuple[str, str]:
    """The screen after an answer that comes in pieces of this size, and all that was written."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80, height=height, color_system=None, soft_wrap=True)
    view = MarkdownView(console)
    for start in range(0, len(source), size):
        view._next_draw_s = 0.0
        view.content(source[start : start + size])
    view.close()
    screen = Screen()
    screen.feed(written.getvalue().replace("\n", "\r\n").encode())
    return screen.text(), written.getvalue()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_markdown_is_rendered_the_same_however_it_comes(size: int) -> None:
    assert show(ANSWER, size)[0] == SHOWN


def test_a_block_longer_than_the_screen_is_in_the_scrollback_once() -> None:
    lines = [f"line {number}" for number in range(60)]
    source = "\n".join(["```", *lines, "```", "", "End."])
    assert show(source, 3, height=10)[0] == source + "\n"


def test_an_answer_cannot_control_the_terminal() -> None:
    screen, written = show("red \x1b[31m, a bell \x07 and \x9b31m more", 4)
    assert screen == "red [31m, a bell  and 31m more\n"
    assert "\x07" not in written and "\x9b" not in written and "\x1b[31m" not in written


def test_the_screen_is_the_same_however_it_is_read() -> None:
    """A read may end in the middle of a letter or of a sequence that erases a line."""
    data = "━━━\x1b[1A\r\x1b[2Kthe end\x1b[?25h\r\n".encode()
    whole, pieces = Screen(), Screen()
    whole.feed(data)
    for byte in data:
        pieces.feed(bytes([byte]))
    assert pieces.text() == whole.text() == "the end\n"


def test_blocks_are_those_of_the_source() -> None:
    blocks = split_blocks(ANSWER)
    assert "".join(blocks) == ANSWER and len(blocks) == 5
    assert split_blocks("") == [""] and split_blocks("1. a\n\n2. b\n") == ["1. a\n\n2. b\n"]


# ---- generate ----


def test_generate_on_a_terminal_shows_the_answer_alone(tmp_path: Path) -> None:
    with open_tty(tmp_path, "generate", "-p", "hi", "--max-tokens", "2000") as tty:
        assert tty.wait() == 0
        assert tty.screen.text() == SHOWN, "progress is gone, and no log line came between"
    with open_tty(tmp_path, "generate", "-p", "hi", "--plain", "--max-tokens", "2000", reply="**a**\n\n\n- b") as tty:
        assert tty.wait() == 0
        assert tty.screen.text() == "**a**\n\n\n- b\n"


def test_ctrl_c_ends_generate_with_what_was_said(tmp_path: Path) -> None:
    with open_tty(tmp_path, "generate", "-p", "hi", reply="Once upon a time", HANG="9") as tty:
        tty.wait_for("Once upo")
        tty.type("keys\n")  # which are not shown
        tty.type("\x03")
        assert tty.wait() == 130
        assert tty.screen.text() == "Once upon\n"


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    model.write_bytes(b"GGUF")
    command = [sys.executable, "-c", PROGRAM, "generate", str(model), "-p", "hi", "--max-tokens", "100000"]
    environment = {**os.environ, "REPLY": "x" * 5000, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(command, env=environment, **pipes) as process:  # a whole process, from its start to its end
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        told = process.stderr.read().decode()
        assert process.wait() == 1
    assert "Traceback" not in told and "Broken" not in told


def test_a_job_in_the_background_of_a_terminal_is_not_stopped(tmp_path: Path) -> None:
    words = "import os\nfrom tinyvllm.cli.terminal import without_echo\nos.setpgid(0, 0)\n"  # as a shell does for `&`
    words += "with without_echo():\n    print('it ran')\n"
    with Tty(
        ["/bin/sh", "-c", f'"{sys.executable}" -c "$WORDS"; true'], {"WORDS": words, "PYTHONPATH": str(ROOT)}
    ) as tty:
        tty.wait_for("it ran")
        assert tty.wait() == 0


# ---- chat ----


def at_prompt(text: str) -> bool:
    """Keys that are typed earlier may be lost: readline sets up the terminal first."""
    return text.endswith("\n>\n")


def test_a_chat_on_a_terminal(tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    with open_tty(tmp_path, "chat", "--max-tokens", "200", reply="Fine **day**.") as tty:
        assert "/help: commands" in tty.wait_for(at_prompt)
        tty.type('"""\n')
        tty.wait_for("\n…")
        tty.type("one\n")
        tty.wait_for("one\n…")
        tty.type('two"""\n')
        tty.wait_for(lambda text: at_prompt(text) and text.count("Fine day.") == 1)
        tty.type("/stats\n")
        tty.wait_for(lambda text: at_prompt(text) and "speed of answers is shown" in text)
        tty.type("/regen\n")
        tty.wait_for(lambda text: at_prompt(text) and "tokens/s" in text)
        tty.type(f"/save {saved}\n")
        tty.wait_for(lambda text: at_prompt(text) and "Saved 2 messages" in text)
        tty.type("/exit\n")
        assert tty.wait() == 0
    document: dict[str, Any] = json.loads(saved.read_text())
    assert document["messages"] == [
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "Fine **day**."},
    ]
    history = tmp_path / "chat_history"
    assert "/regen" in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_pasted_lines_are_one_message(tmp_path: Path) -> None:
    saved = tmp_path / "chat.md"
    with open_tty(tmp_path, "chat", "--no-history", "--max-tokens", "200", reply="Fine.") as tty:
        tty.wait_for(at_prompt)
        tty.type("first\nsecond\nthird\n")  # without the marks that many terminals put around a paste
        tty.wait_for(lambda text: at_prompt(text) and "Fine." in text)
        tty.type(f"/save {saved}\n")
        tty.wait_for(lambda text: at_prompt(text) and "Saved 2 messages" in text)
        tty.type("\x04")
        assert tty.wait() == 0
    assert "## User\n\nfirst\nsecond\nthird\n\n## Assistant\n\nFine.\n" in saved.read_text()
    assert not (tmp_path / "chat_history").exists()


# ---- serve ----


def test_what_follows_progress_bars_waits_until_they_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's stderr and stdout have queues of their own."""
    written = io.StringIO()
    waited: list[str] = []
    monkeypatch.setattr(terminal, "err", Console(file=written, force_terminal=True))
    monkeypatch.setattr(terminal, "finish_outputs", lambda: waited.append(written.getvalue()))
    with terminal.progress_bars() as report:
        report("load", 0, 1)
    assert waited == [written.getvalue()] and "load" in waited[0]


def test_a_start_of_serve_fits_on_a_screen(tmp_path: Path) -> None:
    with open_tty(tmp_path, "serve", "--port", "0") as tty:
        shown = tty.wait_for("docs/CLIENTS.md")
        assert shown.count("\n") <= 24 and "━" not in shown, "progress is gone"
        assert "HTTP is up on" in shown and "Web page" in shown and "INFO" not in shown
        tty.type("\x03")
        assert tty.wait() == 0
        assert "Traceback" not in tty.screen.text()
