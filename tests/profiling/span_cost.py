"""What a span costs while a recording runs, and the part of it that is the thread's clock:
`python -m tests.profiling.span_cost`."""

from __future__ import annotations

import time
from collections.abc import Callable

from tinyvllm.profiling import measure

NUM = 50_000


def each_us(call: Callable[[], object]) -> float:
    """The least of five rounds, in processor time."""
    rounds = []
    for _ in range(5):
        start_ns = time.thread_time_ns()
        for _ in range(NUM):
            call()
        rounds.append((time.thread_time_ns() - start_ns) / NUM / 1e3)
    return min(rounds)


def span() -> None:
    with measure.span(measure.PACK):
        pass


if __name__ == "__main__":
    off_us = each_us(span)
    measure.start(max_spans=1024)
    on_us = each_us(span)
    measure.stop()
    print(
        f"a span: {off_us:.2f} us while off, {on_us:.2f} us while on; thread's clock: "
        f"{2 * each_us(time.thread_time_ns):.2f} us of it"
    )
