"""Send load to a server with OpenAI's API, and time its answers.

Closed loop: a fixed number of requests is open, and each answer makes room for the next. Open loop: requests arrive at
random times (a Poisson process), whether or not the server keeps up. The metrics are vLLM's: TTFT is the time to the
first piece of text, TPOT the remaining time divided by the number of tokens after the first, ITL every gap between two
pieces of text, and E2E the time to the last piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tinyvllm.bench.prompts import SENTENCES
from tinyvllm.bench.spread import Spread
from tinyvllm.errors import TinyvllmError

Report = Callable[[str, int, int], None]  # stage, done, total

APIS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# Of the built-in text with vocabularies of 50,000 tokens. Only an estimate: the server counts the real lengths.
CHARACTERS_PER_TOKEN = 4.4
SLO_NAMES = ("ttft", "tpot", "itl", "e2e")
CONNECT_TIMEOUT_S = 10.0
POLL_S = 0.2  # interval between polls of a server that is warming up


@dataclass(frozen=True)
class Target:
    """A server. `url` has no path, such as http://127.0.0.1:8000. `transport`: for tests."""

    url: str
    model: str
    api: str = "completions"
    api_key: str | None = None
    ignore_eos: bool = True  # vLLM's field, which we support: without it answers may be shorter than asked for
    timeout_s: float = 600.0
    transport: httpx.AsyncBaseTransport | None = None

    def __post_init__(self) -> None:
        if self.api not in APIS:
            raise TinyvllmError(f"--api is {self.api!r}: choose from {', '.join(APIS)}")

    def body(self, prompt: str, num_output: int) -> dict[str, Any]:
        """A greedy streaming request for exactly `num_output` tokens."""
        given: dict[str, Any] = {"prompt": prompt}
        if self.api == "chat":
            given = {"messages": [{"role": "user", "content": prompt}]}
        more = {"ignore_eos": True} if self.ignore_eos else {}
        return {
            "model": self.model,
            **given,
            "max_tokens": num_output,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }

    def client(self) -> httpx.AsyncClient:
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(self.timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            transport=self.transport,
            trust_env=False,  # a proxy would be measured along with the server
        )


@dataclass(frozen=True)
class Load:
    """One level of load: `concurrency` requests at once, or `rate` per second with at most `concurrency` open."""

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.concurrency < 1:
            raise TinyvllmError(f"--concurrency is {self.concurrency}: give at least 1")
        if self.rate is not None and self.rate <= 0:
            raise TinyvllmError(f"--rate is {self.rate}: give requests per second, above 0")
        if self.rate is None and self.concurrency is None:
            raise TinyvllmError("there is no load: give --concurrency or --rate")

    @property
    def name(self) -> str:
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g} per second"


@dataclass(frozen=True)
class LoadWork:
    """The requests of each level: `num_warmup` uncounted ones, then `num_requests`. No two prompts begin alike, so that
    no prefix cache matches. `slo_ms`: limits by name that a request must meet to count as good."""

    num_requests: int = 32
    num_warmup: int = 4
    input_len: int = 128
    output_len: int = 64
    seed: int = 0
    slo_ms: dict[str, float] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))  # so that no two runs send the same prompts

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("num-prompts", self.num_requests, 1),
            ("warmup", self.num_warmup, 0),
            ("input-len", self.input_len, 8),
            ("output-len", self.output_len, 2),  # a time between tokens needs two
        ):
            if value < least:
                raise TinyvllmError(f"--{flag} is {value}: give at least {least}")
        unknown = sorted(set(self.slo_ms) - set(SLO_NAMES))
        if unknown:
            raise TinyvllmError(f"--goodput has {', '.join(unknown)}: choose from {', '.join(SLO_NAMES)}")

    def prompt(self, number: int) -> str:
        """About `input_len` tokens of text, different for each number from the first word on."""
        words = [f"{number}-{self.run_id}:"]
        sentences = itertools.islice(itertools.cycle(SENTENCES), number % len(SENTENCES), None)
        size = round(self.input_len * CHARACTERS_PER_TOKEN)
        while sum(len(word) + 1 for word in words) < size:
            words += next(sentences).split()
        return " ".join(words)[:size]


@dataclass
class Answer:
    """The outcome of one request. Times are seconds of time.perf_counter."""

    sent_s: float
    text_s: list[float] = field(default_factory=list)  # when each piece of text arrived
    num_input: int | None = None  # tokens, as counted by the server
    num_output: int | None = None
    error: str | None = None

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
        return [(after - before) * 1e3 for before, after in itertools.pairwise(self.text_s)]

    def keeps(self, slo_ms: dict[str, float]) -> bool:
        """Whether every limit is met. For itl the longest gap counts."""
        values = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "itl": max(self.itl_ms, default=0.0), "e2e": self.e2e_ms}
        return self.error is None and all((values[name] or 0.0) <= limit for name, limit in slo_ms.items())


async def find_model(target: Target) -> str:
    """The first model that the server lists. Raises TinyvllmError if there is no server, or it refuses."""
    try:
        async with target.client() as client:
            response = await client.get("/v1/models")
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise TinyvllmError(f"{target.url}/v1/models answered {_describe(error.response)}") from error
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise TinyvllmError(f"no OpenAI server answers at {target.url}: {type(error).__name__} {error}") from error


async def until_warm(client: httpx.AsyncClient, report: Report) -> None:
    """Wait until the server captures no more graphs between steps. Ours says so at /ready; others return at once."""
    total = 0
    while True:
        try:
            to_come = int((await client.get("/ready")).json()["num_captures_to_come"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError):  # another server, without this field
            return
        total = max(total, to_come)
        if total:
            report("warm-up", total - to_come, total)
        if not to_come:
            return
        await asyncio.sleep(POLL_S)


async def measure_load(target: Target, work: LoadWork, loads: Sequence[Load], report: Report) -> list[dict[str, Any]]:
    """Measure each level of load once the server is warm; one row of JSON values for each.

    Raises TinyvllmError if no request of a level succeeds."""
    rows = []
    number = itertools.count()  # of prompts: none comes twice
    async with target.client() as client:
        await until_warm(client, report)
        for load in loads:
            warm = dataclasses.replace(load, rate=None, concurrency=load.concurrency or work.num_warmup or 1)
            await _send_all(client, target, work, warm, [next(number) for _ in range(work.num_warmup)], None)
            numbers = [next(number) for _ in range(work.num_requests)]
            answers = await _send_all(client, target, work, load, numbers, report)
            rows.append(summarize(target, work, load, answers))
    return rows


def summarize(target: Target, work: LoadWork, load: Load, answers: Sequence[Answer]) -> dict[str, Any]:
    """The row of one level. Raises TinyvllmError if no request succeeded."""
    good = [answer for answer in answers if answer.error is None]
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    if not good:
        raise TinyvllmError(f"all {len(answers)} requests to {target.url} failed: {errors.most_common(1)[0][0]}")
    duration_s = max(answer.text_s[-1] for answer in good) - min(answer.sent_s for answer in answers)
    num_input = sum(answer.num_input or 0 for answer in good)
    num_output = sum(answer.num_tokens for answer in good)
    num_kept = sum(answer.keeps(work.slo_ms) for answer in good)
    tpot_ms = [answer.tpot_ms for answer in good if answer.tpot_ms is not None]
    return {
        "kind": "load",
        "url": target.url,
        "api": target.api,
        "model": target.model,
        "rate": load.rate,
        "concurrency": load.concurrency,
        "requests": len(answers),
        "errors": dict(errors),
        "duration_s": duration_s,
        "request_s": len(good) / duration_s,
        "input_tokens": num_input,
        "output_tokens": num_output,
        "output_tok_s": num_output / duration_s,
        "total_tok_s": (num_input + num_output) / duration_s,
        "slo_ms": work.slo_ms,
        "goodput_request_s": num_kept / duration_s if work.slo_ms else None,
        "goodput_share": num_kept / len(answers) if work.slo_ms else None,
        "ttft_ms": dataclasses.asdict(Spread.of([answer.ttft_ms for answer in good])),
        "tpot_ms": _spread(tpot_ms),
        "itl_ms": _spread([gap for answer in good for gap in answer.itl_ms]),
        "e2e_ms": dataclasses.asdict(Spread.of([answer.e2e_ms for answer in good])),
    }


def _spread(values: list[float]) -> dict[str, Any] | None:
    return dataclasses.asdict(Spread.of(values)) if values else None


async def _send_all(
    client: httpx.AsyncClient,
    target: Target,
    work: LoadWork,
    load: Load,
    numbers: Sequence[int],
    report: Report | None,
) -> list[Answer]:
    """Send all requests at the given load; returns when all of them have ended."""
    slots: contextlib.AbstractAsyncContextManager[Any]
    slots = contextlib.nullcontext() if load.concurrency is None else asyncio.Semaphore(load.concurrency)
    arrivals = random.Random(work.seed)
    done = 0

    async def send(number: int) -> Answer:
        nonlocal done
        async with slots:
            answer = await _send(client, target, target.body(work.prompt(number), work.output_len))
        done += 1
        if report is not None:
            report(load.name, done, len(numbers))
        return answer

    tasks = []
    start_s, due_s = time.perf_counter(), 0.0
    for number in numbers:
        if load.rate is not None:
            due_s += arrivals.expovariate(load.rate)
            await asyncio.sleep(start_s + due_s - time.perf_counter())
        tasks.append(asyncio.create_task(send(number)))
    return list(await asyncio.gather(*tasks))


async def _send(client: httpx.AsyncClient, target: Target, body: dict[str, Any]) -> Answer:
    """Send one request. Errors are recorded in the answer."""
    answer = Answer(time.perf_counter())
    try:
        async with client.stream("POST", APIS[target.api], json=body) as response:
            if response.status_code != 200:
                await response.aread()
                answer.error = _describe(response)
                return answer
            async for event in _events(response):
                _take(answer, event, time.perf_counter())
    except (httpx.HTTPError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if answer.error is None and not answer.text_s:
        answer.error = "the answer has no text"
    return answer


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event as it arrives."""
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            yield json.loads(data)


def _take(answer: Answer, event: dict[str, Any], now_s: float) -> None:
    """Record an event: text, the server's counts, or an error."""
    if event.get("error"):
        error = event["error"]
        answer.error = str(error.get("message", error) if isinstance(error, dict) else error)
        return
    if usage := event.get("usage"):
        answer.num_input, answer.num_output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"):
            answer.text_s.append(now_s)


def _describe(response: httpx.Response) -> str:
    """The status and the server's message."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text[:200]
    return f"{response.status_code}: {message}" if message else str(response.status_code)
