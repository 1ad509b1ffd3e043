"""What the accounting that is always on costs, in processor time of its thread: for each step, token and request, and
in bytes and allocated blocks of memory: `python -m tests.server.times_cost`."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable

from tests.server.test_request_times import delta_of, timing_of
from tinyvllm.engine.step_clock import DECODE, LOOP, TOKENS, Passage, StepClock
from tinyvllm.server.request_log import MAX_RECORDS, RequestLog
from tinyvllm.server.request_times import RequestTimes, server_timing

NUM = 2_000


def each_us(call: Callable[[], object]) -> float:
    """The least of many short rounds: other programs of the machine only lengthen one."""
    rounds = []
    for _ in range(30):
        start_ns = time.thread_time_ns()
        for _ in range(NUM // 10):
            call()
        rounds.append((time.thread_time_ns() - start_ns) / (NUM // 10) / 1e3)
    return min(rounds)


def step(clock: StepClock) -> None:
    """The marks of one turn of the loop."""
    for _ in range(5):
        clock.mark(LOOP)
    clock.mark_divided(DECODE, 1e-6, TOKENS)
    clock.mark_divided(DECODE, 1e-6, TOKENS)


def in_engine(clock: StepClock) -> None:
    """The notes of one request."""
    passage = Passage.begin(clock)
    passage.leave_queue()
    passage.add_chunk(DECODE, 1e-3)
    passage.before_first()
    passage.after_first()


def main() -> None:
    clock, log = StepClock(), RequestLog()
    timing = timing_of(random.Random(1), 0.0, has_parts=True)
    delta, plain = delta_of(timing), delta_of(timing, None)

    def in_server() -> None:
        times = RequestTimes()
        times.begin(time.perf_counter())
        times.call_ids.append("cmpl-0")
        times.note(plain, 1.0)
        times.note(delta, 1.0)
        server_timing(times, time.perf_counter())
        server_timing(times, time.perf_counter())  # at a stream's start and at its end
        log.add("0", times, "/v1/completions", 200)

    def per_token() -> None:
        if delta.timing is None:
            raise AssertionError

    print(f"a step: {each_us(lambda: step(clock)):.1f} us, 0 for each of its sequences")
    print(f"a token: {each_us(per_token) - each_us(lambda: None):.2f} us")
    engine_us, server_us = each_us(lambda: in_engine(clock)), each_us(in_server)
    print(f"a request: {engine_us:.0f} us in the engine, {server_us:.0f} us in the server")
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    kept = RequestLog()
    for number in range(MAX_RECORDS):
        times = RequestTimes(call_ids=[f"cmpl-{number:032x}-0"])
        times.begin(time.perf_counter())
        times.note(delta, 1.0)
        kept.add(f"{number:032x}", times, "/v1/completions", 200)
        del times
    found = tracemalloc.take_snapshot().compare_to(before, "filename")
    size, blocks = sum(one.size_diff for one in found), sum(one.count_diff for one in found)
    each = f"{size / MAX_RECORDS:,.0f} bytes and {blocks / MAX_RECORDS:.1f} blocks a request"
    print(f"the ring: {each}, {size / 2**20:.1f} MiB in all")


if __name__ == "__main__":
    main()
