"""Questions to processes that answer late, or never."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, cast

import pytest

from tests.patience import jump_over_waits
from tinyvllm.server import questions
from tinyvllm.server.control import Message
from tinyvllm.server.process import Process
from tinyvllm.server.questions import GET_RESPONSE, Questions


class FakeProcess:
    """Answers with `answer`, if it has one."""

    def __init__(self, name: str, answer: Message | None) -> None:
        self.name = name
        self.answer = answer
        self.asker: Questions | None = None

    def send(self, kind: str, *, number: int, question: str, about: str) -> None:
        if self.answer is not None and self.asker is not None:
            message = {"number": number, "answer": self.answer}
            asyncio.get_running_loop().call_soon(self.asker.take_answer, self.name, message)


def processes_of(answers: Mapping[str, Message | None]) -> tuple[Questions, list[Any]]:
    fakes = [FakeProcess(name, answer) for name, answer in answers.items()]
    asker = Questions(cast("dict[str, Process]", {fake.name: fake for fake in fakes}))
    for fake in fakes:
        fake.asker = asker
    return asker, fakes


async def test_the_first_answer_that_is_not_empty_is_enough() -> None:
    jump_over_waits()
    asker, fakes = processes_of({"empty": {}, "knows": {"answer": 1}, "silent": None})
    async with asyncio.timeout(0.5):
        answers = await asker.ask_first(fakes, GET_RESPONSE, "r")
    assert answers["knows"] == {"answer": 1} and "silent" not in answers


async def test_silent_processes_are_named_once_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jump_over_waits()
    monkeypatch.setattr(questions, "ALL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(questions, "FIRST_TIMEOUT_S", 0.05)
    asker, fakes = processes_of({"one": {}, "other": None, "asking": None})
    with caplog.at_level(logging.WARNING):
        async with asyncio.timeout(2):
            assert await asker.ask_all("stop_profile", but="asking") == {"one": {}}
            assert await asker.ask_first(fakes[:2], GET_RESPONSE, "r") == {"one": {}}
    assert [record.getMessage() for record in caplog.records] == [
        "no answer within 0.05 s to stop_profile from other",
        "no answer within 0.05 s to get_response from other",
    ]


async def test_nobody_waits_for_a_process_that_has_died() -> None:
    jump_over_waits()
    asker, _ = processes_of({"one": {"pid": 1}, "dead": None})
    asyncio.get_running_loop().call_later(0.01, asker.forget, "dead")
    async with asyncio.timeout(2):
        assert await asker.ask_all("start_profile") == {"one": {"pid": 1}}
