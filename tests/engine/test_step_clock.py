"""The engine's clock gives every moment to one stage, and divides each request's time without a gap."""

from __future__ import annotations

import random

import pytest

from tests.engine.fakes import FakeCaptures, FakeModelRunner
from tests.scheduling.fakes import make_request
from tinyvllm.engine import core as core_module
from tinyvllm.engine.core import EngineCore
from tinyvllm.engine.messages import Output
from tinyvllm.engine.output import output_of
from tinyvllm.engine.step_clock import StepClock
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.plan import StepOutput, StepPlan, TokenOut
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler


class VirtualTime:
    """A clock that only `pass_` moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


class TimedRunner(FakeModelRunner):
    """Packs for 1 s; a step with prompts takes the device 10 s, another 2 s; making tokens takes 0.5 s."""

    def __init__(self, time: VirtualTime, **capacity: int) -> None:
        super().__init__(**capacity)
        self.time = time

    def launch(self, plan: StepPlan) -> StepOutput:
        self.time.pass_(1.0)
        output = super().launch(plan)
        output.__dict__.update(pack_s=1.0, tokens_s=0.5, seconds=2.0 if plan.is_decode else 10.0)
        return output

    def collect(self, flight: StepOutput) -> StepOutput:
        self.time.pass_(flight.__dict__["seconds"] + 0.5)
        return super().collect(flight)


class SlowCaptures(FakeCaptures):
    def __init__(self, time: VirtualTime, num_to_come: int) -> None:
        super().__init__(num_to_come)
        self.time = time

    def advance(self) -> None:
        self.time.pass_(7.0)
        super().advance()


class Engine:
    """A core on virtual time, whose outputs are kept with the moment at which they were known."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_captures: int = 0, **capacity: int) -> None:
        self.time = VirtualTime()
        monkeypatch.setattr(core_module, "StepClock", lambda: StepClock(self.time))
        runner = TimedRunner(self.time, **capacity)
        limits = runner.capacity
        blocks = BlockManager(limits.groups, limits.block_size, enable_prefix_caching=False)
        captures = SlowCaptures(self.time, num_captures) if num_captures else None
        self.core = EngineCore(runner, Scheduler(blocks, limits), captures)
        self.outputs: dict[str, list[tuple[float, Output]]] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int) -> Request:
        request = make_request(name, prompt, max_tokens=max_tokens)
        self.core.add(request)
        return request

    def turn(self) -> None:
        """A turn of the loop, which takes 0.25 s to pass the outputs on."""
        self.pass_on(self.core.step())
        if self.core.has_captures_to_come:
            self.pass_on(self.core.advance_captures())
        self.time.pass_(0.25)

    def pass_on(self, outs: list[TokenOut]) -> None:
        for out in outs:
            one = self.core.clock.now_s, output_of(out)
            self.outputs.setdefault(out.request.request_id, []).append(one)

    def run(self) -> None:
        while self.core.has_work:
            self.turn()


def test_a_request_alone_has_its_own_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    engine.add("r", [1, 2, 3], 3)
    engine.run()
    (_, first), _, (_, last) = engine.outputs["r"]
    assert first.queue is not None and first.prefill is not None and last.decode is not None
    assert first.queue.total_s == 0.0 and last.num_chunks == 1
    assert (first.prefill.pack, first.prefill.prefill, first.prefill.tokens) == (1.0, 10.0, 0.5)
    assert (first.prefill.others, first.prefill.decode, last.decode.others, last.decode.prefill) == (0, 0, 0, 0)
    assert (last.decode.pack, last.decode.decode, last.decode.tokens, last.decode.loop) == (2.0, 4.0, 1.0, 0.5)


def test_other_requests_prompts_and_captures_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, num_captures=1)
    engine.add("first", [1, 2, 3], 4)
    engine.turn()  # its prompt, and a capture of two parts: 7 s each
    engine.add("second", [4, 5, 6], 2)
    engine.run()
    decode = engine.outputs["first"][-1][1].decode
    assert decode is not None and (decode.others, decode.capture) == (10.0, 14.0)
    second = engine.outputs["second"][0][1]
    assert second.prefill is not None and (second.prefill.prefill, second.prefill.others) == (10.0, 0.0)


def test_a_request_in_the_queue_is_told_what_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    most = engine.core.scheduler.capacity.max_num_seqs
    for index in range(most):
        engine.add(f"r{index}", [1, 2], 3)
    engine.add("late", [3, 4], 1)
    engine.run()
    late = engine.outputs["late"][0][1]
    assert late.queue is not None and late.prefill is not None and late.decode is not None
    assert late.queue.others >= 10.0 and late.queue.decode >= 4.0 and late.queue.prefill == 0.0
    assert late.prefill.prefill == 10.0 and late.decode.total_s == 0.0


def test_no_moment_is_lost_or_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random requests, with preemptions: each one's parts add up to its time from the queue to its last token."""
    rng = random.Random(3)
    engine, requests = Engine(monkeypatch, num_captures=2, num_blocks=24, max_model_len=64), []
    for index in range(40):
        prompt = [rng.randrange(10) for _ in range(rng.randrange(1, 30))]
        requests.append(engine.add(f"r{index}", prompt, rng.randrange(1, 25)))
        for _ in range(rng.randrange(3)):
            engine.turn()
    engine.run()
    assert engine.core.scheduler.num_preemptions > 0
    for request in requests:
        outputs = engine.outputs[request.request_id]
        (first_s, first), (last_s, last) = outputs[0], outputs[-1]
        assert first.queue is not None and first.prefill is not None and last.decode is not None
        assert first.queue.total_s + first.prefill.total_s == pytest.approx(first_s - request.queued_s)
        assert last.decode.total_s == pytest.approx(last_s - first_s)
        for parts in (first.queue, first.prefill, last.decode):
            assert all(getattr(parts, name) > -1e-9 for name in parts.__struct_fields__)
