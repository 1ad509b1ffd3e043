"""What `bench serve` sends: the server, the levels of load, and the requests.

Closed loop: a fixed number of requests is open, and each answer makes room for the next. Open loop: requests arrive at
random times (a Poisson process), whether or not the server keeps up. Load processes import this module, so it stays
light.
"""

from __future__ import annotations

import itertools
import json
import random
import secrets
from dataclasses import dataclass, field
from typing import Any

from tinyvllm.bench.prompts import SENTENCES, make_ids
from tinyvllm.errors import TinyvllmError

APIS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# Of the built-in text with vocabularies of 50,000 tokens. Only an estimate: the server counts the real lengths.
CHARACTERS_PER_TOKEN = 4.4
SLO_NAMES = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True)
class Target:
    """A server. `url` has no path, such as http://127.0.0.1:8000, or names a socket: unix:/run/tinyvllm.sock."""

    url: str
    model: str
    api: str = "completions"
    api_key: str | None = None
    ignore_eos: bool = True  # vLLM's field, which we support: without it answers may be shorter than asked for
    timeout_s: float = 600.0
    keeps_alive: bool = True  # one connection carries one request after another

    def __post_init__(self) -> None:
        if self.api not in APIS:
            raise TinyvllmError(f"--api is {self.api!r}: choose from {', '.join(APIS)}")

    @property
    def unix_socket(self) -> str | None:
        """The path of the server's socket, if it listens on one."""
        return self.url.removeprefix("unix:").removeprefix("//") if self.url.startswith("unix:") else None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def body(self, prompt: str | list[int], num_output: int) -> dict[str, Any]:
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

    def arrivals(self, count: int, seed: int) -> list[float] | None:
        """When requests arrive, in seconds after the start: a Poisson process. None for a closed loop."""
        if self.rate is None:
            return None
        rng, rate = random.Random(seed), self.rate
        return list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))


@dataclass(frozen=True)
class LoadWork:
    """The requests of each level: `num_warmup` uncounted ones, then `num_requests`. No two prompts begin alike, so that
    no prefix cache matches. `slo_ms`: limits by name that a request must meet to count as good. With `vocab_size`,
    prompts are exactly `input_len` random token ids below it instead of text."""

    num_requests: int = 32
    num_warmup: int = 4
    input_len: int = 128
    output_len: int = 64
    seed: int = 0
    slo_ms: dict[str, float] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))  # so that no two runs send the same prompts
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("num-prompts", self.num_requests, 1),
            ("warmup", self.num_warmup, 0),
            ("input-len", self.input_len, 8),
            ("output-len", self.output_len, 2),  # a time between tokens needs two
            ("vocab-size", self.vocab_size or 2, 2),
        ):
            if value < least:
                raise TinyvllmError(f"--{flag} is {value}: give at least {least}")
        unknown = sorted(set(self.slo_ms) - set(SLO_NAMES))
        if unknown:
            raise TinyvllmError(f"--goodput has {', '.join(unknown)}: choose from {', '.join(SLO_NAMES)}")

    def prompt(self, number: int) -> str | list[int]:
        """About `input_len` tokens of text, different for each number from the first word on; or as many random ids."""
        if self.vocab_size is not None:
            return make_ids(self.input_len, self.vocab_size, int(self.run_id, 16) << 32 | number)
        words = [f"{number}-{self.run_id}:"]
        sentences = itertools.islice(itertools.cycle(SENTENCES), number % len(SENTENCES), None)
        size = round(self.input_len * CHARACTERS_PER_TOKEN)
        while sum(len(word) + 1 for word in words) < size:
            words += next(sentences).split()
        return " ".join(words)[:size]

    def request(self, target: Target, number: int) -> bytes:
        """The JSON of a request."""
        return json.dumps(target.body(self.prompt(number), self.output_len)).encode()
