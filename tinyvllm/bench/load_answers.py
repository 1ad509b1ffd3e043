"""The answers that a load process has timed, and the bytes in which it hands them over."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

# of Answer, all but its times
PLAIN_FIELDS = ("sent_s", "num_input", "num_output", "error", "end_s", "request_id", "server_ms")


def _no_times() -> array[float]:
    return array("d")


@dataclass
class Answer:
    """The outcome of one request. Times are seconds of time.perf_counter, which is one clock for all processes."""

    sent_s: float = 0.0  # when the request was written to an open connection
    text_s: array[float] = field(default_factory=_no_times)  # when each piece of text arrived
    num_input: int | None = None  # tokens, as counted by the server
    num_output: int | None = None
    error: str | None = None
    end_s: float = 0.0  # when the response was complete
    request_id: str | None = None  # the response's x-request-id
    server_ms: dict[str, float] | None = None  # where the server says its time went: the parts and "total", in ms

    @property
    def num_tokens(self) -> int:
        """Output tokens. If the server does not count them, the number of pieces of text."""
        return len(self.text_s) if self.num_output is None else self.num_output

    @property
    def ttft_ms(self) -> float:
        return (self.text_s[0] - self.sent_s) * 1e3

    @property
    def e2e_ms(self) -> float:
        return (self.text_s[-1] - self.sent_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """None for a single token."""
        return (self.e2e_ms - self.ttft_ms) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def itl_ms(self) -> list[float]:
        """The gaps between pieces of text: 0 between two that arrived in the same network read."""
        return [(after - before) * 1e3 for before, after in itertools.pairwise(self.text_s)]

    def keeps(self, slo_ms: dict[str, float]) -> bool:
        """Whether every limit is met. For itl the longest gap counts."""
        values = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "itl": max(self.itl_ms, default=0.0), "e2e": self.e2e_ms}
        return self.error is None and all((values[name] or 0.0) <= limit for name, limit in slo_ms.items())


@dataclass
class Share:
    """What one process measured at one level of load."""

    answers: list[Answer]
    cpu_s: float = 0.0  # processor time of the process during the level
    late_s: array[float] = field(default_factory=_no_times)  # open loop: how long after its time each request was sent


def pack_share(share: Share) -> bytes:
    """One line of JSON and the times as 8-byte floats: 8 bytes an event, however many there are."""
    header = {
        "cpu_s": share.cpu_s,
        "num_late": len(share.late_s),
        "answers": [
            [len(answer.text_s), *[getattr(answer, name) for name in PLAIN_FIELDS]] for answer in share.answers
        ],
    }
    times = [share.late_s.tobytes(), *[answer.text_s.tobytes() for answer in share.answers]]
    return b"".join([json.dumps(header).encode(), b"\n", *times])


def unpack_share(data: bytes) -> Share:
    """The inverse of `pack_share`."""
    line, _, times = data.partition(b"\n")
    header = json.loads(line)
    sizes = [header["num_late"], *[size for size, *_ in header["answers"]]]
    late_s, *text_s = _split(times, sizes)
    answers = [
        Answer(text_s=text, **dict(zip(PLAIN_FIELDS, values, strict=True)))
        for (_, *values), text in zip(header["answers"], text_s, strict=True)
    ]
    return Share(answers, header["cpu_s"], late_s)


def _split(data: bytes, sizes: Sequence[int]) -> list[array[float]]:
    """Consecutive arrays of the given numbers of floats."""
    view, arrays, place = memoryview(data), [], 0
    for size in sizes:
        times = array("d")
        times.frombytes(view[place : place + 8 * size])
        arrays.append(times)
        place += 8 * size
    return arrays
