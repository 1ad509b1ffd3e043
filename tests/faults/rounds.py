"""A round of all kinds of requests to an AsyncEngine, how each of them ended, and what an engine holds afterwards."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np

from tests.engine.fakes import EOS_ID, FakeModelRunner, make_loaded
from tests.patience import PATIENCE_S
from tests.scheduling.fakes import VOCAB_SIZE
from tinyvllm.config import EngineConfig, GrammarSpec, SamplingParams
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.beam import generate_beams
from tinyvllm.engine.loading import LoadedEngine, Progress
from tinyvllm.errors import TinyvllmError
from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.request import Constraint, Request
from tinyvllm.text.grammar import Matcher

NUM_BLOCKS, NUM_STATES = 24, 10  # few enough that requests are preempted
NUM_WORDS = -(-VOCAB_SIZE // 32)
SHARED = list(b"A beginning that all of the prompts share, ")
SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
OK = "ok"
Outcome = str  # OK, or how it ended


class PoolingRunner(FakeModelRunner):
    """A device of integers that embeds, too."""

    def execute(self, plan: StepPlan) -> StepOutput:
        pooled = tuple(np.full(8, 1 + entry.start, np.float32) for entry in plan.pooled)
        return replace(super().execute(plan), pooled=pooled)


def make_runner(max_in_flight: int, **capacity: int) -> FakeModelRunner:
    """A device that says letters, and what a grammar allows."""
    runner = PoolingRunner(**capacity)
    runner.max_in_flight = max_in_flight
    runner.plans = deque(maxlen=1)  # type: ignore[assignment]  # else it would keep them all

    def choose(request: Request, digest: int) -> int:
        """A letter, or an id that the request's grammar allows after the token in flight."""
        if request.constraint is None:
            return 97 + digest % 26
        matcher, mask = copy_matcher(request.constraint), np.zeros(NUM_WORDS, np.int32)
        if request.num_in_flight:
            matcher.accept(runner._newest[request])
        matcher.fill_mask(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        return int(allowed[digest % len(allowed)]) if len(allowed) else EOS_ID

    runner.choose = choose
    return runner


def copy_matcher(constraint: Constraint) -> Matcher:
    assert isinstance(constraint, Matcher)
    return Matcher(constraint._matcher.deep_copy(), VOCAB_SIZE)


def start_fake_engine(max_in_flight: int = 1) -> AsyncEngine:
    """An engine around the device of integers, in a pool in which requests preempt each other."""

    def load(config: EngineConfig, progress: Progress) -> LoadedEngine:
        runner = make_runner(
            max_in_flight,
            num_blocks=NUM_BLOCKS,
            num_state_slots=NUM_STATES,
            max_num_seqs=6,
            max_num_batched_tokens=32,
            block_size=8,
            max_model_len=160,
        )
        return make_loaded(runner)

    return AsyncEngine.start(EngineConfig("tiny"), load=load)


class Rounds:
    """Sends rounds of requests to one engine. Call its methods on one event loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._number = 0
        self._expected: list[int] | None = None

    async def run(self) -> dict[str, Outcome]:
        """One round: every kind at once. Each ends, within PATIENCE_S, with an answer or with a reason."""
        self._number += 1
        work: dict[str, Callable[[str], Awaitable[Outcome]]] = {
            "stream": lambda name: self._generate(name, max_tokens=40),
            "long": lambda name: self._generate(name, max_tokens=6, prompt=SHARED * 2 + list(b"long")),
            "choices": lambda name: self._generate(name, max_tokens=24, n=3, temperature=1.0, seed=1),
            "grammar": lambda name: self._generate(name, max_tokens=24, grammar=GrammarSpec("json_schema", SCHEMA)),
            "logprobs": lambda name: self._generate(name, max_tokens=8, logprobs=3, prompt_logprobs=2),
            "stop": lambda name: self._generate(name, max_tokens=60, stop=["e", "ab"]),
            "embed": self._embed,
            "beams": self._beams,
            "left": self._leave,
        }
        async with asyncio.timeout(PATIENCE_S):
            outcomes = await asyncio.gather(*(ask(f"{kind}-{self._number}") for kind, ask in work.items()))
        return dict(zip(work, outcomes, strict=True))

    async def answers(self) -> Outcome:
        """OK if the next request is answered, and as the first one that was ever sent was."""
        self._number += 1
        ids: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            outcome = await self._generate(f"next-{self._number}", max_tokens=12, ids=ids)
        if self._expected is None:
            self._expected = ids
        return outcome if ids == self._expected or outcome != OK else f"answered {ids} instead of {self._expected}"

    async def left(self) -> dict[str, Any]:
        """What the engine and its client still hold, once aborted requests are gone. Audits the pools."""
        end_s = time.monotonic() + PATIENCE_S
        [counts] = await self.engine.audit()
        while counts["requests"] and time.monotonic() < end_s:
            await asyncio.sleep(0.005)
            [counts] = await self.engine.audit()
        clients = [client for _, client in self.engine._host.clients()]
        return counts | {
            "calls": sum(len(client.calls) for client in clients),
            "choices": sum(len(client._choices) for client in clients),
            "tasks": len(asyncio.all_tasks()),
            "threads": threading.active_count(),
        }

    async def _generate(
        self,
        name: str,
        prompt: list[int] | None = None,
        ids: list[int] | None = None,
        **settings: Any,
    ) -> Outcome:
        """Generate, greedily unless told."""
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **settings})
        ends: list[str] = []
        try:
            prompt = prompt or SHARED + list(name.split("-")[0].encode())
            async for delta in self.engine.generate(prompt, params, request_id=name):
                if ids is not None:
                    ids += delta.token_ids
                if delta.finish_reason is not None:
                    ends.append(delta.error or f"{delta.finish_reason} without a reason")
                    if delta.finish_reason in ("stop", "length"):
                        ends[-1] = OK
        except (TinyvllmError, MemoryError, OSError, RuntimeError) as error:  # as the server answers them
            return f"{type(error).__name__}: {error}"
        assert len(ends) == params.n, f"{name}: {len(ends)} of {params.n} choices ended"
        return next((end for end in ends if end != OK), OK)

    async def _embed(self, name: str) -> Outcome:
        try:
            await self.engine.embed(SHARED[:20], request_id=name)
        except (TinyvllmError, MemoryError, OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return OK

    async def _beams(self, name: str) -> Outcome:
        params = SamplingParams(temperature=1.0, n=2, max_tokens=5, ignore_eos=True)
        ends = []
        try:
            async for delta in generate_beams(self.engine, SHARED[:30], params, request_id=name):
                ends.append(OK if delta.finish_reason in ("stop", "length") else str(delta.error))
        except (TinyvllmError, MemoryError, OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return next((end for end in ends if end != OK), OK) if ends else "beams ended without a word"

    async def _leave(self, name: str) -> Outcome:
        """Leave in the middle of a stream."""
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        try:
            async with aclosing(self.engine.generate(SHARED, params, request_id=name)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is not None or delta.num_output_tokens > 3:
                        return delta.error or OK
        except (TinyvllmError, MemoryError, OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "left without a word"
