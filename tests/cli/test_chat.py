"""`tinyvllm chat`: history, commands and the two ways to interrupt."""

from __future__ import annotations

import builtins
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fakes import Terminal, make_terminal
from tests.text.harmony import TEMPLATE
from tinyvllm.errors import ContextLengthError, EngineDeadError
from tinyvllm.text.chat import ChatTemplate


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException] | Callable[[], str]) -> None:
    """What input() returns, line by line; an exception is what a key press raises, a function is asked."""
    typed: Iterator[Any] = iter((*lines, EOFError))

    def read(_: str = "") -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        if isinstance(line, type):
            raise line
        return str(line())

    monkeypatch.setattr(builtins, "input", read)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    return make_terminal(monkeypatch, tmp_path, reply="Fine.")


def test_answers_become_history(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    type_in(monkeypatch, "hi", "  ", "again")
    result = terminal.run("chat", "--system", "Be kind.", "--max-tokens", "40")
    assert result.exit_code == 0 and result.stdout.count("Fine.\n") == 2
    first, second = (call.prompt for call in terminal.engine.calls)
    assert first == "<system>Be kind.\n<user>hi\n<assistant>"
    assert second == "<system>Be kind.\n<user>hi\n<assistant>Fine.\n<user>again\n<assistant>"
    assert terminal.configs[0].max_num_seqs == 1 and terminal.engine.has_shut_down


def test_reset_forgets_and_exit_leaves(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    type_in(monkeypatch, "hi", "/reset", "again", "/what", "/exit", "never")
    result = terminal.run("chat")
    assert [call.prompt for call in terminal.engine.calls] == ["<user>hi\n<assistant>", "<user>again\n<assistant>"]
    assert "/what is not a command" in result.stderr


def test_interrupt_at_the_prompt_does_not_leave(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    type_in(monkeypatch, KeyboardInterrupt, "hi")
    assert terminal.run("chat").exit_code == 0
    assert len(terminal.engine.calls) == 1


def test_interrupt_stops_the_answer_and_not_the_program(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    engine = terminal.engine
    engine.hang_after = 3
    encode = engine.tokenizer.encode_chat
    # not SIGALRM, which belongs to the time limit of tests
    interrupt = threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))

    def encode_and_plan_an_interrupt(text: str) -> list[int]:
        if not engine.calls:
            interrupt.start()
        else:
            engine.hang_after = None
        return encode(text)

    monkeypatch.setattr(engine.tokenizer, "encode_chat", encode_and_plan_an_interrupt)
    type_in(monkeypatch, "hi", "again")
    # what a terminal's programs start with; in the background of a script, SIGINT is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = terminal.run("chat")
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 0 and "Fin [stopped]\n" in result.stdout and "Fine.\n" in result.stdout
    assert engine.closed == ["chat-1"]
    assert engine.calls[1].prompt == "<user>hi\n<assistant>Fin\n<user>again\n<assistant>"


def test_refused_question_is_not_kept(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    type_in(monkeypatch, "\ud800", "hi")
    result = terminal.run("chat")
    assert result.exit_code == 0 and "error: " in result.stderr
    assert [call.prompt for call in terminal.engine.calls] == ["<user>hi\n<assistant>"]


def test_failed_answer_is_told_and_the_chat_goes_on(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    terminal.engine.fail_after = 2
    type_in(monkeypatch, "hi")
    result = terminal.run("chat")
    assert result.exit_code == 0 and "logits are not finite" in result.stderr


def test_dead_engine_ends_the_chat(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    terminal.engine.refuse = EngineDeadError("the engine's thread has stopped")
    type_in(monkeypatch, "hi", "again")
    result = terminal.run("chat")
    assert result.exit_code == 1 and "thread has stopped" in result.stderr
    assert len(terminal.engine.calls) == 1


def test_dead_engine_ends_the_chat_in_a_command_too(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    def die() -> str:
        terminal.engine.refuse = EngineDeadError("the engine's thread has stopped")
        return "/regen"

    type_in(monkeypatch, "hi", die, "again")
    result = terminal.run("chat")
    assert result.exit_code == 1 and "thread has stopped" in result.stderr
    assert len(terminal.engine.calls) == 2


def test_model_without_a_template_cannot_chat(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    terminal.engine.chat_template = None
    type_in(monkeypatch, "hi")
    result = terminal.run("chat")
    assert result.exit_code == 1 and "--chat-template" in result.stderr and terminal.engine.has_shut_down


def test_reasoning_is_shown_and_told_from_the_answer(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    terminal.engine.reply = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    terminal.engine.chat_template = ChatTemplate({"default": TEMPLATE}, {}, "tiny")  # type: ignore[assignment]
    type_in(monkeypatch, "hi", "again")
    result = terminal.run("chat", "--max-tokens", "200")
    assert result.stdout.count("Hm.\n\nYes.\n") == 2
    assert "<|start|>assistant<|channel|>final<|message|>Yes.<|end|>" in terminal.engine.calls[1].prompt
    assert "Hm." not in terminal.engine.calls[1].prompt


def test_commands_change_the_conversation(monkeypatch: pytest.MonkeyPatch, terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    lines = ("/regen", "/system", "/system Be kind.", "one", "two\\", "more", "/regen", f"/save {path}", "/reset")
    type_in(monkeypatch, "/help", *lines, f"/load {path}", "three", "/save nowhere", "/load nowhere", "/stats", "four")
    result = terminal.run("chat")
    assert result.exit_code == 0
    prompts = [call.prompt for call in terminal.engine.calls]
    start = "<system>Be kind.\n<user>one\n<assistant>"
    second = f"{start}Fine.\n<user>two\nmore\n<assistant>"
    assert prompts[:3] == [start, second, second], "the answer is made again, not continued"
    assert prompts[3] == f"{second}Fine.\n<user>three\n<assistant>", "reset forgets, and load brings it back"
    for told in ("no answer yet", "chat template decides", "Saved 5 messages", "Loaded 4 messages", "tokens/s"):
        assert told in result.stderr
    assert result.stderr.count("error: ") == 2 and "/regen" in result.stderr
    assert result.stdout == "Fine.\n" * 5


def test_a_full_context_comes_with_advice(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    type_in(monkeypatch, "hi", "again")
    terminal.engine.refuse = ContextLengthError("the prompt has 5000 tokens")
    result = terminal.run("chat")
    assert result.exit_code == 0 and "/reset starts a new conversation" in result.stderr
    type_in(monkeypatch, "hi")
    terminal.engine.refuse = None
    assert "cut after --max-tokens 2" in terminal.run("chat", "--max-tokens", "2").stderr
