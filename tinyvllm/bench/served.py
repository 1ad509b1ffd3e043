"""Where served time goes: load for a server that records, and its requests put together stage by stage.

The load is that of `bench serve`. Each level runs twice: without a recording, for the figures that users see, and with
one, for the stages. The client's times are the borders of each request, so the stages, which the server's processes
measure, are checked against a clock that is not the server's.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tinyvllm.bench.load import Load, LoadWork, Target
from tinyvllm.bench.load_answers import Answer, Share
from tinyvllm.bench.load_measure import Report, make_client, until_warm
from tinyvllm.bench.load_processes import LoadProcesses, choose_num_processes, split_load
from tinyvllm.bench.load_rows import summarize
from tinyvllm.bench.load_stream import describe_error
from tinyvllm.errors import TinyvllmError
from tinyvllm.profiling.measure import Recording
from tinyvllm.profiling.recording_codec import decode_recordings
from tinyvllm.profiling.request_stages import ClientTimes, Served, assemble
from tinyvllm.profiling.stage_rows import process_as_json, served_as_json

MAX_RESIDUAL_SHARE = 0.02
POLL_S = 0.2
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class ServedLevel:
    """One level of load. `plain` and `recorded` are the rows of `bench serve` without and with a recording."""

    plain: dict[str, Any]
    recorded: dict[str, Any]
    served: Served
    recordings: Sequence[Recording]

    @property
    def overhead_share(self) -> float:
        """How much longer a token took while recording."""
        return float(self.plain["output_tok_s"] / self.recorded["output_tok_s"] - 1)

    def as_json(self) -> dict[str, Any]:
        return {
            "concurrency": self.plain["concurrency"],
            "plain": self.plain,
            "recorded": self.recorded,
            "overhead_share": self.overhead_share,
            **served_as_json(self.served),
            "processes": [process_as_json(recording) for recording in self.recordings],
        }


def measure_served(target: Target, work: LoadWork, loads: Sequence[Load], report: Report) -> list[ServedLevel]:
    """Measure each level of load on a server that was started with --enable-profiling, once it is warm.

    Raises TinyvllmError if it does not record, or if no request of a level succeeds."""
    numbers = itertools.count()  # of prompts: none comes twice
    counts = [choose_num_processes(load, work.num_requests) for load in loads]
    until_warm(target, report)
    levels = []
    with LoadProcesses(target, work, max(counts)) as processes:
        for load, count in zip(loads, counts, strict=True):

            def run(num_requests: int, name: str, load: Load = load, count: int = count) -> list[Share]:
                drawn = [next(numbers) for _ in range(num_requests)]
                jobs = split_load(load, drawn, count, work.seed)
                return processes.run(jobs, lambda done: report(name, done, num_requests))

            run(max(work.num_warmup, load.concurrency or 1), f"{load.name}, warm-up")
            plain = summarize(target, work, load, run(work.num_requests, load.name))
            _post(target, "/start_profile")
            shares = run(work.num_requests, f"{load.name}, recorded")
            recordings = decode_recordings(_post(target, "/stop_profile?format=recordings"))
            served = assemble(recordings, client_times(shares))
            levels.append(ServedLevel(plain, summarize(target, work, load, shares), served, recordings))
    return levels


def client_times(shares: Sequence[Share]) -> dict[str, ClientTimes]:
    """What the load processes saw of each request, by the id that the server gave it."""
    answers = [answer for share in shares for answer in share.answers]
    return {
        answer.request_id: ClientTimes(_ns(answer.sent_s), _ns(answer.text_s[0]), _ns(answer.end_s))
        for answer in answers
        if answer.request_id is not None and _is_complete(answer)
    }


@contextlib.contextmanager
def running_server(model: str, flags: Sequence[str]) -> Iterator[str]:
    """`tinyvllm serve` as a process that may record, on a free port of this machine; yields its URL once it is ready.

    Its log goes to stderr. Raises TinyvllmError if it ends before it is ready."""
    url = f"http://127.0.0.1:{_free_port()}"
    command = [sys.executable, "-P", "-m", "tinyvllm", "serve", model, "--enable-profiling", "--no-access-log"]
    command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--log-stats-interval", "0", *flags]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ.copy())
    try:
        _until_ready(process, url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    with httpx.Client(trust_env=False) as client:
        while True:
            if process.poll() is not None:
                raise TinyvllmError(f"the server ended with code {process.returncode} before it was ready: see its log")
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/ready").status_code == 200:
                    return
            time.sleep(POLL_S)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _post(target: Target, path: str) -> bytes:
    with make_client(target) as client:
        try:
            response = client.post(path)
        except httpx.HTTPError as error:
            raise TinyvllmError(f"{target.url}{path}: {type(error).__name__} {error}") from error
    if response.status_code != 200:
        raise TinyvllmError(f"{target.url}{path} answered {describe_error(response.status_code, response.content)}")
    return response.content


def _is_complete(answer: Answer) -> bool:
    return answer.error is None and bool(answer.text_s) and answer.end_s > 0


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
