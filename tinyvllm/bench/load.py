"""Requests to a server that speaks OpenAI's format, as many at once or a second as asked for, and how it fared.

Closed loop: a fixed number of requests is open, each answer makes room for the next. Open loop: requests come at random
times (Poisson) whether or not the server keeps up. Definitions are vLLM's: TTFT until the first text, TPOT the rest of
the time over the tokens behind the first, ITL every gap between two pieces of text, E2E until the last of them.
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
CHARACTERS_PER_TOKEN = (
    4.4  # of the built-in text, with vocabularies of 50,000 tokens: lengths are counted by the server
)
SLO_NAMES = ("ttft", "tpot", "itl", "e2e")
CONNECT_TIMEOUT_S = 10.0
POLL_S = 0.2  # between two looks at a server that warms up


@dataclass(frozen=True)
class Target:
    """A server: `url` without its path, such as http://127.0.0.1:8000. `transport`: for tests."""

    url: str
    model: str
    api: str = "completions"
    api_key: str | None = None
    ignore_eos: bool = True  # a field of vLLM's and ours: without it answers may be shorter than asked for
    timeout_s: float = 600.0
    transport: httpx.AsyncBaseTransport | None = None

    def __post_init__(self) -> None:
        if self.api not in APIS:
            raise TinyvllmError(f"--api is {self.api!r}: known are {', '.join(APIS)}")

    def body(self, prompt: str, num_output: int) -> dict[str, Any]:
        """A greedy, streamed request for exactly so many tokens."""
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
            trust_env=False,  # a proxy between us and the server would be measured with it
        )


@dataclass(frozen=True)
class Load:
    """One level of load: `concurrency` requests at once, or `rate` a second with at most `concurrency` open."""

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.concurrency < 1:
            raise TinyvllmError(f"--concurrency has {self.concurrency}: give at least 1")
        if self.rate is not None and self.rate <= 0:
            raise TinyvllmError(f"--rate has {self.rate}: give requests a second, above 0")
        if self.rate is None and self.concurrency is None:
            raise TinyvllmError("there is no load: give --concurrency or --rate")

    @property
    def name(self) -> str:
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g} a second"


@dataclass(frozen=True)
class LoadWork:
    """For each level `num_warmup` requests that nobody counts, then `num_requests`. No two prompts begin alike, so that
    no prefix cache finds them. `slo_ms`: limits that a request must keep to count as good, by name."""

    num_requests: int = 32
    num_warmup: int = 4
    input_len: int = 128
    output_len: int = 64
    seed: int = 0
    slo_ms: dict[str, float] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))  # so that no run finds an earlier one's prompts

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
            raise TinyvllmError(f"--goodput has {', '.join(unknown)}: known are {', '.join(SLO_NAMES)}")

    def prompt(self, number: int) -> str:
        """About `input_len` tokens of text that is no other number's from its first word on."""
        words = [f"{number}-{self.run_id}:"]
        sentences = itertools.islice(itertools.cycle(SENTENCES), number % len(SENTENCES), None)
        size = round(self.input_len * CHARACTERS_PER_TOKEN)
        while sum(len(word) + 1 for word in words) < size:
            words += next(sentences).split()
        return " ".join(words)[:size]


@dataclass
class Answer:
    """What one request met with, in perf_counter's seconds."""

    sent_s: float
    text_s: list[float] = field(default_factory=list)  # when each piece of text came
    num_input: int | None = None  # tokens, by the server's count
    num_output: int | None = None
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Of output. Where the server counts none, pieces of text stand for them."""
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
        """Whether every limit holds; of gaps between tokens the longest counts."""
        values = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "itl": max(self.itl_ms, default=0.0), "e2e": self.e2e_ms}
        return self.error is None and all((values[name] or 0.0) <= limit for name, limit in slo_ms.items())


async def find_model(target: Target) -> str:
    """The first model of the server's list. Raises TinyvllmError where there is no server, or it refuses."""
    try:
        async with target.client() as client:
            response = await client.get("/v1/models")
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise TinyvllmError(f"{target.url}/v1/models answered {_describe(error.response)}") from error
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise TinyvllmError(f"there is no OpenAI server at {target.url}: {type(error).__name__} {error}") from error


async def until_warm(client: httpx.AsyncClient, report: Report) -> None:
    """Return when the server captures no graphs between steps any more, where it says that it does: ours, at /ready."""
    total = 0
    while True:
        try:
            to_come = int((await client.get("/ready")).json()["num_captures_to_come"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError):  # another server, which has no such thing
            return
        total = max(total, to_come)
        if total:
            report("warm-up", total - to_come, total)
        if not to_come:
            return
        await asyncio.sleep(POLL_S)


async def measure_load(target: Target, work: LoadWork, loads: Sequence[Load], report: Report) -> list[dict[str, Any]]:
    """One row a level of load, JSON values, once the server is warm.

    Raises TinyvllmError where not one request of a level succeeds."""
    rows = []
    number = itertools.count()  # of prompts: none comes twice
    async with target.client() as client:
        await until_warm(client, report)
        for load in loads:
            warm = dataclasses.replace(load, rate=None, concurrency=load.concurrency or work.num_warmup or 1)
            await _send_all(client, target, work, warm, [next(number) for _ in range(work.num_warmup)], None)
            numbers = [next(number) for _ in range(work.num_requests)]
            answers = await _send_all(client, target, work, load, numbers, report)
            rows.append(summarise(target, work, load, answers))
    return rows


def summarise(target: Target, work: LoadWork, load: Load, answers: Sequence[Answer]) -> dict[str, Any]:
    """A row of the requests of one level. Raises TinyvllmError where none succeeded."""
    good = [answer for answer in answers if answer.error is None]
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    if not good:
        raise TinyvllmError(f"none of {len(answers)} requests to {target.url} succeeded: {errors.most_common(1)[0][0]}")
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
    """All requests by their load; returns once every one has ended."""
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
    """One request. What goes wrong is in the answer."""
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
        answer.error = "an answer without text"
    return answer


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of server-sent events, as they come."""
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            yield json.loads(data)


def _take(answer: Answer, event: dict[str, Any], now_s: float) -> None:
    """Book what an event says: text, the server's counts, or an error."""
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
    """Status and the server's own words."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text[:200]
    return f"{response.status_code}: {message}" if message else str(response.status_code)
