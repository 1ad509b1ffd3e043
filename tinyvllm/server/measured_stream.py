"""A stream's writer that notes when it does what, for streams that begin while a recording runs."""

from __future__ import annotations

import time

from starlette.types import Message, Send

from tinyvllm.profiling import measure
from tinyvllm.server.context import current
from tinyvllm.server.events import Events
from tinyvllm.server.generation import Item
from tinyvllm.server.streaming import EventWriter


def make_writer(events: Events) -> EventWriter:
    """The writer of a new stream. Measuring is decided here once, so that it costs nothing for each token if it is
    off."""
    return MeasuredWriter(events) if measure.is_on() else EventWriter(events)


class MeasuredWriter(EventWriter):
    """Adds up the time that events take, and records one span for the whole stream when it is complete.

    The facts of the span are times in ns: of the engine, from the last delta, and when the first and the last output
    were taken, formatted and, for the first, sent."""

    def __init__(self, events: Events) -> None:
        super().__init__(events)
        self._http_id = current().request_id
        self._times_ns: dict[str, int] = {}
        self._num_tokens = 0

    def take(self, item: Item) -> None:
        delta, now_ns = item.delta, time.perf_counter_ns()
        self._times_ns.setdefault("first_taken_ns", now_ns)
        self._num_tokens = delta.num_output_tokens
        if (timing := delta.timing) is not None and delta.finish_reason is not None:
            self._times_ns |= {
                "last_taken_ns": now_ns,
                "scheduled_ns": int(timing.scheduled_s * 1e9),
                "first_token_ns": int(timing.first_token_s * 1e9),
                "last_token_ns": int(timing.last_token_s * 1e9),
            }
        super().take(item)

    async def write_all(self, send: Send, start: Message) -> None:
        await super().write_all(send, start)
        times_ns, now_ns = self._times_ns, time.perf_counter_ns()
        if "last_formatted_ns" in times_ns and "last_taken_ns" in times_ns:  # else it ended with an error
            start_ns = times_ns["first_taken_ns"]
            measure.add(measure.ANSWER, start_ns, now_ns, http=self._http_id, num_tokens=self._num_tokens, **times_ns)

    def _format(self, item: Item) -> bytes:
        start_ns, start_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        data = super()._format(item)
        end_ns = time.perf_counter_ns()
        measure.tally(measure.SERIALIZE, start_ns, end_ns, time.thread_time_ns() - start_cpu_ns)
        self._times_ns.setdefault("first_formatted_ns", end_ns)
        self._times_ns["last_formatted_ns"] = end_ns
        return data

    def _write(self, data: bytes) -> None:
        start_ns, start_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        super()._write(data)
        end_ns = time.perf_counter_ns()
        measure.tally(measure.SEND, start_ns, end_ns, time.thread_time_ns() - start_cpu_ns)
        self._times_ns.setdefault("first_sent_ns", end_ns)
