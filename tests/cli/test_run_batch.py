"""`tinyvllm run-batch`: every line is answered once, and mistakes are named before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fakes import Terminal, make_terminal
from tinyvllm.faults import Fault, planned


def line(custom_id: str, url: str = "/v1/chat/completions", **body: Any) -> str:
    content = {"messages": [{"role": "user", "content": custom_id}]} if "chat" in url else {}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {**content, **body}})


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    return make_terminal(monkeypatch, tmp_path)


def run(terminal: Terminal, tmp_path: Path, *lines: str) -> tuple[int, list[dict[str, Any]], str]:
    """(exit code, answers, what stderr says)."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n\n")
    result = terminal.run("run-batch", "-i", str(source), "-o", str(target))
    written = target.read_text(encoding="utf-8") if target.exists() else ""
    return result.exit_code, [json.loads(text) for text in written.splitlines()], result.stderr


def test_every_line_is_answered(terminal: Terminal, tmp_path: Path) -> None:
    code, answers, said = run(
        terminal,
        tmp_path,
        line("a", max_tokens=5),
        line("b", "/v1/completions", prompt="x", max_tokens=3),
        line("c", "/v1/responses", input="x"),
    )
    assert code == 0 and "3 answered, 0 failed" in said
    found = {answer["custom_id"]: answer for answer in answers}
    assert sorted(found) == ["a", "b", "c"] and len(answers) == 3
    response = found["a"]["response"]
    assert response["status_code"] == 200 and response["request_id"] and found["a"]["error"] is None
    assert response["body"]["choices"][0]["message"]["content"] == "Hello"
    assert found["b"]["response"]["body"]["object"] == "text_completion"
    assert found["c"]["response"]["body"]["object"] == "response"
    assert found["a"]["id"].startswith("batch_req_")
    assert terminal.engine.has_shut_down


def test_a_refused_request_is_one_answer_and_the_others_go_on(terminal: Terminal, tmp_path: Path) -> None:
    code, answers, said = run(terminal, tmp_path, line("a", temperature=-1), line("b", model="gpt-9"), line("c"))
    assert code == 1 and "1 answered, 2 failed" in said
    found = {answer["custom_id"]: answer["response"] for answer in answers}
    assert [found[name]["status_code"] for name in "abc"] == [400, 404, 200]
    assert found["a"]["body"]["error"]["param"] == "temperature"


def test_more_requests_than_the_queue_of_a_server_holds(terminal: Terminal, tmp_path: Path) -> None:
    code, answers, _ = run(terminal, tmp_path, *(line(str(n), max_tokens=1) for n in range(2100)))
    assert code == 0 and {answer["custom_id"] for answer in answers} == {str(n) for n in range(2100)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 2: it is not JSON"),
        ("[]", "custom_id"),
        (line("a"), "is also used in an earlier line"),
        (json.dumps({"custom_id": "b", "url": "/v1/files", "body": {}}), "/v1/completions"),
        (json.dumps({"custom_id": "b", "url": "/v1/completions", "method": "GET", "body": {}}), "POST"),
        (json.dumps({"custom_id": "b", "url": "/v1/completions"}), "body"),
        (line("b", stream=True), "does not stream"),
    ],
)
def test_a_wrong_line_is_named_before_the_model_is_loaded(
    terminal: Terminal, tmp_path: Path, text: str, message: str
) -> None:
    code, answers, said = run(terminal, tmp_path, line("a"), text)
    assert code == 1 and message in said and "line 2" in said
    assert answers == [] and not terminal.configs


def test_an_empty_or_missing_file_is_an_error(terminal: Terminal, tmp_path: Path) -> None:
    assert "no requests" in run(terminal, tmp_path, "")[2]
    result = terminal.run("run-batch", "-i", str(tmp_path / "nowhere.jsonl"))
    assert result.exit_code == 1 and "cannot be read" in result.stderr


def test_stdin_and_stdout(terminal: Terminal) -> None:
    result = terminal.run("run-batch", "-i", "-", stdin=line("a", max_tokens=5))
    assert result.exit_code == 0


def test_a_full_disk_ends_the_batch_with_a_sentence_and_keeps_what_was_written(
    terminal: Terminal, tmp_path: Path
) -> None:
    with planned(Fault("disk.batch", "os", at=2)):
        code, answers, said = run(terminal, tmp_path, *[line(name) for name in "abc"])
    assert code == 1 and 1 <= len(answers) < 3 and "Traceback" not in said
    assert "the answers cannot be written to" in said and "No space left on device" in said
    assert terminal.engine.has_shut_down
