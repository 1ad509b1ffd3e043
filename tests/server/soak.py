"""Rough traffic for a server process, checks of every answer, and checks that nothing is left over.

    python -m tests.server.soak fake 100000 3600

soaks a server on the tests' device of integers (or on a tiny random model: `model`) with so many requests, or for so
many seconds, whichever ends first, and prints what came of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

MAX_MODEL_LEN = 256
NUM_BLOCKS = 24  # few enough that requests are preempted
FLAGS = (
    "--port", "0", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--num-gpu-blocks-override",
    str(NUM_BLOCKS), "--max-num-batched-tokens", "64", "--max-num-queued-requests", "22", "--shutdown-timeout", "3",
    "--no-access-log", "--log-level", "warning", "--served-model-name", "tiny",
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
# Bad bodies, and the status that answers each.
BAD: tuple[tuple[dict[str, Any] | bytes, int], ...] = (
    ({"prompt": 7}, 400),
    ({"prompt": "x" * 400}, 400),
    ({"prompt": "x", "max_tokens": 0}, 400),
    ({"prompt": "x", "max_tokens": 10_000}, 400),
    ({"prompt": [[99_999]]}, 400),
    ({"prompt": "x", "temperature": "hot"}, 400),
    ({"prompt": "x", "n": 1000}, 400),
    ({"prompt": "x", "model": "other"}, 404),
    ({"prompt": "x", "stop_token_ids": [1 << 40]}, 400),
    (b'{"prompt": "x"', 400),
    (b"\xff\xfe", 400),
    (b"[" * 5000, 400),
)


class ServerFault(AssertionError):
    """The server did something that no client should ever see."""


@dataclass
class Figures:
    """The outcomes of the traffic, and reports on the process."""

    outcomes: Counter[str] = field(default_factory=Counter)
    answers: dict[str, str] = field(default_factory=dict)  # greedy: request -> the only answer it may have
    num_tokens: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)  # on the process: before, at each quarter, after

    def lines(self) -> str:
        counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(self.outcomes.items()))
        rss = ", ".join(f"{report['rss_mib']:.1f}" for report in self.reports)
        last = self.reports[-1]
        return (
            f"{sum(self.outcomes.values())} requests: {counts}\n"
            f"{self.num_tokens} output tokens in complete answers, {last['steps']} steps, "
            f"{last['preemptions']} preemptions\n"
            f"RSS before, at each quarter and after, in MiB: {rss}\n"
            f"left: {last}"
        )


# ---- The process ----


class Process:
    """A server process, and the pipe that it reports through."""

    def __init__(self, popen: subprocess.Popen[str], url: str) -> None:
        self.popen = popen
        self.url = url

    def report(self) -> dict[str, Any]:
        """A report on the process. The server also audits its pool."""
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.popen.stdin.write("report\n")
        self.popen.stdin.flush()
        for line in self.popen.stdout:
            if line.startswith("{"):  # before it comes what the server prints when it is ready
                return dict(json.loads(line))
        raise ServerFault("the server sent no report: its stderr says why")


@contextlib.contextmanager
def serving_process(device: str, model: str, log: Path, *flags: str) -> Iterator[Process]:
    """A server process that is ready to answer. Its stderr goes to `log`."""
    command = [sys.executable, "-m", "tests.server.soak_server", device, "serve", model, *FLAGS, *flags]
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment,
        ) as popen,
    ):
        try:
            assert popen.stdout is not None
            greeting = popen.stdout.readline()
            if " is served on " not in greeting:
                raise ServerFault(f"the server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
            popen.stdout.readline()  # the example that follows
            yield Process(popen, greeting.split(" is served on ")[1].split()[0])
        finally:
            popen.kill()


# ---- One request ----


class RandomClient:
    """Sends random requests, determined by a seed, and checks the answers."""

    def __init__(self, client: httpx.AsyncClient, figures: Figures, seed: int, *, has_grammar: bool) -> None:
        self._client = client
        self._figures = figures
        self._random = random.Random(seed)
        self._has_grammar = has_grammar

    async def ask(self) -> None:
        """Send one request of a random kind. Raises ServerFault for a wrong answer."""
        kinds = {
            self._whole: 30, self._stream: 18, self._leave_stream: 14, self._leave_early: 6, self._long: 8,
            self._bad: 8, self._guided: 6, self._embed: 4, self._beams: 3, self._tools: 3,
        }  # fmt: skip
        kind = self._random.choices(list(kinds), list(kinds.values()))[0]
        outcome = await kind()
        self._figures.outcomes[outcome] += 1
        if outcome == "refused as too many":
            await asyncio.sleep(0.1)  # less than Retry-After says, so that the queue stays full

    def _body(self) -> tuple[str, dict[str, Any]]:
        pick = self._random
        body: dict[str, Any] = {"max_tokens": pick.randint(1, 40), "ignore_eos": True}
        if pick.random() < 0.5:
            body["temperature"] = 0
        else:
            body |= {"temperature": 1.0, "top_p": 0.9, "n": pick.choice((1, 1, 2)), "seed": pick.randrange(1000)}
            body |= pick.choice(({}, {"stop": ["e", "ab"]}, {"top_k": 5}, {"presence_penalty": 0.5}, {"min_p": 0.1}))
        text = f"{pick.choice(('A shared beginning of all prompts, ', ''))}{pick.randrange(30)}"
        if pick.random() < 0.5:
            return "/v1/completions", body | {"prompt": text}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}

    async def _whole(self) -> str:
        path, body = self._body()
        return self._judge(body, await self._client.post(path, json=body))

    async def _long(self) -> str:
        """A prompt that takes several steps, in which other requests decode."""
        prompt = f"{self._random.randrange(8)} " * self._random.randint(40, 110)
        body = {"prompt": prompt[: MAX_MODEL_LEN - 20], "max_tokens": self._random.randint(1, 16), "ignore_eos": True}
        return self._judge(body, await self._client.post("/v1/completions", json=body))

    async def _embed(self) -> str:
        text = f"{self._random.randrange(30)} " * self._random.randint(1, 20)
        response = await self._client.post("/v1/embeddings", json={"input": [text[:100], "another"]})
        if response.status_code != 200:
            return self._refused(response)
        vectors = [entry["embedding"] for entry in response.json()["data"]]
        self._require(len(vectors) == 2 and all(len(vector) > 4 for vector in vectors), "embeddings are missing")
        return "embedded"

    async def _beams(self) -> str:
        body = {"prompt": f"{self._random.randrange(8)}", "max_tokens": 4, "n": 2, "use_beam_search": True}
        return self._judge({**body, "max_tokens": 4}, await self._client.post("/v1/completions", json=body))

    async def _tools(self) -> str:
        if not self._has_grammar:
            return await self._whole()
        function = {"name": "add", "parameters": SCHEMA}
        body = {
            "messages": [{"role": "user", "content": "go"}],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "required",
            "max_tokens": 80,
            "logprobs": True,
        }
        response = await self._client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            return self._refused(response)
        (choice,) = response.json()["choices"]
        self._require(choice["finish_reason"] in ("tool_calls", "stop", "length"), f"{choice}")
        for call in choice["message"].get("tool_calls") or ():
            if choice["finish_reason"] != "length":
                self._require(set(json.loads(call["function"]["arguments"])) == {"a", "b"}, f"{call}")
        return "called a tool"

    async def _guided(self) -> str:
        if not self._has_grammar:
            return await self._whole()
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        body = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 60, "response_format": form, "seed": 1}
        if self._random.random() < 0.4:
            return await self._left({**body, "stream": True}, "/v1/chat/completions")
        return self._judge(body, await self._client.post("/v1/chat/completions", json=body))

    async def _bad(self) -> str:
        body, status = self._random.choice(BAD)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        response = await self._client.post("/v1/completions", content=content, headers=headers)
        if response.status_code != 429:
            self._require(response.status_code == status, f"{body!r}: {response.status_code} {response.text}")
        return self._refused(response)

    async def _stream(self) -> str:
        path, body = self._body()
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self._client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return self._refused(response)
            chunks = [chunk async for chunk in events(response)]
        if "error" in chunks[-1]:
            raise ServerFault(f"a stream ended with {chunks[-1]}")
        ended = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        self._require(len(ended) == body.get("n", 1), f"{len(ended)} choices ended of {body}")
        self._require(chunks[-1]["usage"]["completion_tokens"] >= 1, "no usage")
        pieces = [
            (choice["index"], choice["delta"].get("content") or "" if "delta" in choice else choice["text"])
            for chunk in chunks
            for choice in chunk["choices"]
        ]
        self._check_greedy(body, "".join(text for index, text in pieces if index == 0))
        self._figures.num_tokens += chunks[-1]["usage"]["completion_tokens"]
        return "streamed"

    async def _leave_stream(self) -> str:
        path, body = self._body()
        return await self._left({**body, "max_tokens": 100, "stream": True}, path)

    async def _left(self, body: dict[str, Any], path: str) -> str:
        async with self._client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return self._refused(response)
            num_wanted = self._random.randint(1, 6)
            async for _ in response.aiter_lines():
                num_wanted -= 1
                if not num_wanted:
                    break
        return "left in the middle"

    async def _leave_early(self) -> str:
        """Leave while the request is being tokenized, is queued, or is in its prompt."""
        path, body = self._body()
        body["max_tokens"] = 100
        try:
            async with asyncio.timeout(self._random.random() * 0.1):
                response = await self._client.post(path, json=body)
        except TimeoutError:
            return "left before an answer"
        return self._judge(body, response)

    def _judge(self, body: dict[str, Any], response: httpx.Response) -> str:
        if response.status_code != 200:
            return self._refused(response)
        answer = response.json()
        self._require(len(answer["choices"]) == body.get("n", 1), f"{answer} for {body}")
        for choice in answer["choices"]:
            self._require(choice["finish_reason"] in ("stop", "length"), f"{choice}")
            self._check_schema(body, choice)
        tokens = answer["usage"]["completion_tokens"]
        if all(choice["finish_reason"] == "length" for choice in answer["choices"]):
            self._require(tokens == body["max_tokens"] * body.get("n", 1), f"{tokens} tokens for {body}")
        first = answer["choices"][0]
        self._check_greedy(body, first["message"]["content"] if "message" in first else first["text"])
        self._figures.num_tokens += tokens
        return "complete"

    def _check_greedy(self, body: dict[str, Any], text: str) -> None:
        """Greedy tokens are the same however the request was batched, chunked, cached or preempted."""
        if body.get("temperature") != 0:
            return
        asked = json.dumps([body.get("prompt"), body.get("messages"), body["max_tokens"]])
        self._require(self._figures.answers.setdefault(asked, text) == text, f"two answers to {asked}")

    def _check_schema(self, body: dict[str, Any], choice: dict[str, Any]) -> None:
        if "response_format" in body and choice["finish_reason"] == "stop":
            value = json.loads(choice["message"]["content"])
            self._require(set(value) == {"a", "b"} and value["b"] in ("x", "y"), f"{value}")

    def _refused(self, response: httpx.Response) -> str:
        """Check a refusal: it has OpenAI's body, and a full queue says when to retry."""
        error = response.json()["error"]
        self._require(set(error) == {"message", "type", "param", "code"} and error["message"], f"{error}")
        self._require(response.status_code in (400, 404, 429), f"{response.status_code}: {error}")
        if response.status_code != 429:
            return "refused as bad"
        self._require("retry-after" in response.headers and error["code"] == "queue_full", f"{error}")
        return "refused as too many"

    def _require(self, claim: object, message: str) -> None:
        if not claim:
            raise ServerFault(message)


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """A stream's events. Raises ServerFault if it ends without [DONE]."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise ServerFault("a stream ended without [DONE]")


# ---- The traffic ----


async def run_traffic(
    process: Process, num_requests: int, concurrency: int, *, has_grammar: bool, seconds: float = math.inf
) -> Figures:
    """Send the requests, but none after `seconds`. Reports before, after each quarter, and once everything is quiet."""
    end_s = time.monotonic() + seconds
    figures = Figures()
    numbers = iter(range(num_requests))
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=process.url, timeout=60, limits=limits) as client:
        figures.reports.append(await asyncio.to_thread(process.report))

        async def send_requests() -> None:
            for number in numbers:
                if time.monotonic() > end_s:
                    return
                await RandomClient(client, figures, seed=number, has_grammar=has_grammar).ask()
                if (number + 1) % (num_requests // 4) == 0:
                    figures.reports.append(await asyncio.to_thread(process.report))

        async def report_quarters() -> None:
            """Of the time, where it is limited."""
            while True:
                await asyncio.sleep(seconds / 4)
                figures.reports.append(await asyncio.to_thread(process.report))

        timer = asyncio.create_task(report_quarters()) if seconds < math.inf else None
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(send_requests())
        if timer is not None:
            timer.cancel()
    await settle(process, figures)
    return figures


async def settle(process: Process, figures: Figures) -> None:
    """Wait until the requests of clients that left are gone, which takes a step. Reports what remains."""
    for _ in range(200):
        report = await asyncio.to_thread(process.report)
        if not report["requests"] and not report["calls"] and report["tasks"] <= figures.reports[0]["tasks"]:
            break
        await asyncio.sleep(0.05)
    figures.reports.append(report)


def check_nothing_is_left(figures: Figures) -> None:
    """Check that every block is free and that no task, thread or stream is left. Each report has audited the pool."""
    first, last = figures.reports[0], figures.reports[-1]
    assert last["free_blocks"] == last["all_blocks"] == NUM_BLOCKS - 1 and last["live_states"] == 0, last
    assert last["requests"] == last["owned_requests"] == last["calls"] == 0, last
    assert last["tasks"] <= first["tasks"], (first, last)
    on_demand = 8 + min(32, (os.cpu_count() or 1) + 4)  # for tokenizing, and asyncio's own
    assert last["threads"] <= first["threads"] + on_demand, (first, last)


async def stop_under_load(process: Process, concurrency: int) -> Counter[str]:
    """Send SIGTERM during long streams. Each must be complete, or report that it was aborted or refused."""
    outcomes: Counter[str] = Counter()
    has_begun = asyncio.Event()

    async def stream(client: httpx.AsyncClient, number: int) -> None:
        body = {"prompt": f"{number}", "max_tokens": 20 + 6 * number, "ignore_eos": True, "stream": True}
        chunks: list[dict[str, Any]] = []
        try:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    code = json.loads(await response.aread())["error"]["code"]
                    outcomes[f"refused: {code}"] += 1
                    return
                async for chunk in events(response):
                    chunks.append(chunk)
                    has_begun.set()
        except (httpx.ConnectError, httpx.ReadError):
            # the kernel resets connections that the server has not accepted when it closes its socket
            assert number >= concurrency // 2 and not chunks, "a request that the server had accepted lost its answer"
            outcomes["refused: the server has stopped"] += 1
            return
        if "error" in chunks[-1]:
            outcomes[f"ended: {chunks[-1]['error']['code']}"] += 1
        else:
            assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
            outcomes["complete"] += 1

    limits = httpx.Limits(max_connections=concurrency)
    async with (
        httpx.AsyncClient(base_url=process.url, timeout=60, limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):
        for number in range(concurrency // 2):
            group.create_task(stream(client, number))
        await has_begun.wait()
        process.popen.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        for number in range(concurrency // 2, concurrency):
            group.create_task(stream(client, number))
    assert await asyncio.to_thread(process.popen.wait, 20) == 0
    return outcomes


async def main(device: str, num_requests: int, seconds: float) -> None:
    from tests.builders import write_tiny_hf_llama

    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_hf_llama(Path(folder) / "tiny").path
        with serving_process(device, str(model), Path(folder) / "log", "--async-scheduling") as process:
            figures = await run_traffic(process, num_requests, 32, has_grammar=True, seconds=seconds)
            print(figures.lines(), flush=True)
            check_nothing_is_left(figures)
        errors = (Path(folder) / "log").read_text(encoding="utf-8").count("Traceback")
    print(f"{errors} tracebacks in the log; nothing is left")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
