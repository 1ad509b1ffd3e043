"""Compiling grammars outside the engine's thread: once each, without delaying anyone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.patience import PATIENCE_S
from tests.text.vocabularies import make_byte_level
from tinyvllm.config import GrammarSpec
from tinyvllm.engine import constraints
from tinyvllm.engine.constraints import GrammarCompiler
from tinyvllm.errors import RequestError
from tinyvllm.text.grammar import GrammarLimits, compile_grammar

DIGITS = GrammarSpec("regex", "[0-9]+")


def make_compiler(**limits: float) -> GrammarCompiler:
    tokenizer = make_byte_level()
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids, GrammarLimits(**limits))  # type: ignore[arg-type]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Grammars of the expression "slow" are compiled once the event is set."""
    event = threading.Event()

    def compile_held(spec: GrammarSpec, *rest: object) -> object:
        if spec.text == "slow":
            event.wait(PATIENCE_S)
        return compile_grammar(spec, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(constraints, "compile_grammar", compile_held)
    return event


async def test_the_same_grammar_is_compiled_once() -> None:
    compiler = make_compiler()
    first, second = await asyncio.gather(compiler.compile(DIGITS), compiler.compile(DIGITS))
    other = await compiler.compile(GrammarSpec("regex", "[0-9]+", param="response_format"))
    assert first is second is other is compiler.compile_now(DIGITS)


async def test_old_grammars_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "MAX_GRAMMARS", 2)
    compiler = make_compiler()
    first = await compiler.compile(DIGITS)
    for pattern in "ab":
        await compiler.compile(GrammarSpec("regex", pattern))
    assert await compiler.compile(DIGITS) is not first


async def test_a_bad_grammar_is_refused_every_time_under_its_own_field() -> None:
    compiler = make_compiler()
    for param in ("response_format", "structured_outputs.regex"):
        with pytest.raises(RequestError) as error:
            await compiler.compile(GrammarSpec("regex", "[", param=param))
        assert error.value.param == param
    with pytest.raises(RequestError):
        compiler.compile_now(GrammarSpec("regex", "["))


async def test_a_slow_grammar_is_refused_and_holds_nobody(held: threading.Event) -> None:
    compiler, slow = make_compiler(), GrammarSpec("regex", "slow", param="response_format")
    waiting = asyncio.ensure_future(compiler.compile(slow))
    await asyncio.sleep(0)
    assert await compiler.compile(DIGITS)  # another thread, and the event loop is free
    patient, compiler._limits = compiler._limits, GrammarLimits(compile_s=0.05)
    with pytest.raises(RequestError, match="took more than") as error:
        await compiler.compile(slow)
    assert error.value.param == "response_format"
    with pytest.raises(RequestError, match="took more than"):
        await asyncio.to_thread(compiler.compile_now, slow)
    compiler._limits = patient
    held.set()
    assert await waiting is await compiler.compile(slow), "what was compiled meanwhile is there for the next"


async def test_a_caller_who_leaves_cancels_nobody_else(held: threading.Event) -> None:
    compiler = make_compiler()
    slow = GrammarSpec("regex", "slow")
    leaving, staying = (asyncio.ensure_future(compiler.compile(slow)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    held.set()
    assert await staying


async def test_only_so_many_wait(held: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "MAX_WAITING", 1)
    compiler = make_compiler()
    first = asyncio.ensure_future(compiler.compile(GrammarSpec("regex", "slow")))
    await asyncio.sleep(0)
    with pytest.raises(RequestError, match="retry later"):
        await compiler.compile(DIGITS)
    held.set()
    await first
    assert await compiler.compile(DIGITS)
