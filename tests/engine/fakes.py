"""Engines around the device of integers, with a real byte tokenizer: token id = byte, EOS = 258."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tests.builders import IM_END_ID, write_byte_tokenizer
from tests.scheduling.fakes import FakeRunner, make_capacity
from tinyvllm.config import EngineConfig, GenerationDefaults, ModelConfig, ModelFiles, Rope
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.loading import LoadedEngine, Progress, assemble_engine
from tinyvllm.engine.output import Delta
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.tiers import Tiers
from tinyvllm.text.chat import ChatTemplate, load_chat_template
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer

EOS_ID = IM_END_ID


class FakeModelRunner(FakeRunner):
    """FakeRunner with what the engine reads of a ModelRunner."""

    device = "FAKE"

    def __init__(self, **capacity: int) -> None:
        self.capacity = make_capacity(**{"max_model_len": 256, **capacity})
        super().__init__(self.capacity.block_size)
        self.model_config = ModelConfig(
            architecture="fake",
            num_layers=1,
            hidden_size=8,
            ffn_size=8,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            vocab_size=self.vocab_size,
            max_position=self.capacity.max_model_len,
            rope=Rope(1e4),
            norm_eps=1e-5,
            tie_embeddings=True,
        )


class FakeCaptures:
    """Graphs that are made in two parts each: tracing, and what needs an idle device."""

    num_failed = 0

    def __init__(self, num_to_come: int, events: list[str] | None = None) -> None:
        self.num_to_come = num_to_come
        self.is_next_compiled = False
        self.events = [] if events is None else events

    def advance(self) -> None:
        if self.is_next_compiled:
            self.num_to_come -= 1
        self.events.append("capture" if self.is_next_compiled else "trace")
        self.is_next_compiled = not self.is_next_compiled and self.num_to_come > 0


@cache
def load_text() -> tuple[Tokenizer, ChatTemplate | None]:
    with tempfile.TemporaryDirectory() as directory:
        write_byte_tokenizer(Path(directory))
        files = ModelFiles("hf", Path(directory), "tiny")
        return load_tokenizer(files), load_chat_template(files)


def say(*answers: str | bytes) -> Callable[[Request, int], int]:
    """A `choose` that spells an answer byte by byte, whatever was asked, and then EOS. Choice i says answers[i]."""
    spelled = [answer.encode() if isinstance(answer, str) else answer for answer in answers]

    def choose(request: Request, digest: int) -> int:
        _, _, index = request.request_id.partition(":")
        answer = spelled[int(index or 0)]
        position = len(request.output_ids)
        return answer[position] if position < len(answer) else EOS_ID

    return choose


def make_loaded(
    runner: FakeModelRunner | None = None,
    defaults: GenerationDefaults | None = None,
    tiers: Tiers | None = None,
    **config: Any,
) -> LoadedEngine:
    return assemble_engine(
        EngineConfig("tiny", **config),
        runner or FakeModelRunner(),
        *load_text(),
        defaults or GenerationDefaults(),
        tiers=tiers,
    )


@asynccontextmanager
async def running_engine(runner: FakeModelRunner | None = None, **config: Any) -> AsyncIterator[AsyncEngine]:
    """An AsyncEngine that is ready; shut down afterwards."""
    runner = runner or FakeModelRunner()

    def load(engine_config: EngineConfig, progress: Progress) -> LoadedEngine:
        return make_loaded(runner, **config)

    engine = AsyncEngine.start(EngineConfig("tiny", **config), load=load)
    try:
        await engine.wait_ready()
        yield engine
    finally:
        await engine.shutdown()


def join(deltas: list[Delta]) -> Delta:
    """All deltas of one choice as one."""
    whole = deltas[0]
    for delta in deltas[1:]:
        whole = whole.then(delta)
    return whole
