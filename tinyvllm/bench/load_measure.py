"""Measure levels of load on a running server: find out what it serves, wait until it is warm, send, and summarize."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from tinyvllm.bench.load import Load, LoadWork, Target
from tinyvllm.bench.load_client import CONNECT_TIMEOUT_S, make_ssl_context, split_url
from tinyvllm.bench.load_processes import LoadProcesses, choose_num_processes, split_load
from tinyvllm.bench.load_rows import summarize
from tinyvllm.bench.load_stream import describe_error
from tinyvllm.bench.trust import ConditionsWatch
from tinyvllm.errors import TinyvllmError

Report = Callable[[str, int, int], None]  # stage, done, total

POLL_S = 0.2  # interval between polls of a server that is warming up


def make_client(target: Target) -> httpx.Client:
    """For the few requests that are not measured. Raises TinyvllmError for a bad address."""
    is_https = split_url(target).scheme == "https"
    return httpx.Client(
        base_url="http://localhost" if target.unix_socket is not None else target.url,
        headers=target.headers,
        timeout=httpx.Timeout(target.timeout_s, connect=CONNECT_TIMEOUT_S),
        transport=httpx.HTTPTransport(uds=target.unix_socket, verify=make_ssl_context() if is_https else False),
        trust_env=False,  # a proxy would be measured along with the server
    )


def find_model(target: Target) -> str:
    """The first model that the server lists. Raises TinyvllmError if there is no server, or it refuses."""
    try:
        return str(_get_json(target, "/v1/models")["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise TinyvllmError(f"{target.url}/v1/models answered {_describe(error.response)}") from error
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise TinyvllmError(f"no OpenAI server answers at {target.url}: {type(error).__name__} {error}") from error


def find_vocab_size(target: Target) -> int:
    """The number of token ids, from /tokenizer_info. Raises TinyvllmError if the server does not say."""
    remedy = "give --vocab-size, below which random ids are drawn"
    try:
        return int(_get_json(target, "/tokenizer_info")["vocab_size"])
    except httpx.HTTPStatusError as error:
        raise TinyvllmError(f"{target.url}/tokenizer_info answered {_describe(error.response)}: {remedy}") from error
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise TinyvllmError(f"{target.url}/tokenizer_info does not give a vocab_size: {remedy}") from error


def until_warm(target: Target, report: Report) -> None:
    """Wait until the server captures no more graphs between steps. Ours says so at /ready; others return at once."""
    total = 0
    while True:
        try:
            to_come = int(_get_json(target, "/ready")["num_captures_to_come"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError):  # another server, without this field
            return
        total = max(total, to_come)
        if total:
            report("warm-up", total - to_come, total)
        if not to_come:
            return
        time.sleep(POLL_S)


def measure_load(
    target: Target, work: LoadWork, loads: Sequence[Load], report: Report, num_processes: int | None = None
) -> list[dict[str, Any]]:
    """Measure each level of load once the server is warm; one row of JSON values for each. `num_processes` that send
    the requests: None chooses by cores and concurrency.

    Raises TinyvllmError if no request of a level succeeds, or if a load process dies."""
    counts = [choose_num_processes(load, work.num_requests, num_processes) for load in loads]
    number = itertools.count()  # of prompts: none comes twice
    rows = []
    until_warm(target, report)
    with LoadProcesses(target, work, max(counts)) as processes:
        for load, count in zip(loads, counts, strict=True):
            if work.num_warmup:
                warm = Load(load.concurrency or work.num_warmup)
                numbers = [next(number) for _ in range(work.num_warmup)]
                processes.run(split_load(warm, numbers, count, work.seed))
            jobs = split_load(load, [next(number) for _ in range(work.num_requests)], count, work.seed)
            with ConditionsWatch() as watch:
                shares = processes.run(jobs, _report_level(report, load, work.num_requests))
            rows.append(summarize(target, work, load, shares, watch))
    return rows


def _report_level(report: Report, load: Load, total: int) -> Callable[[int], None]:
    return lambda done: report(load.name, done, total)


def _get_json(target: Target, path: str) -> Any:
    """Raises httpx.HTTPError, or ValueError if the answer is not JSON."""
    with make_client(target) as client:
        return client.get(path).raise_for_status().json()


def _describe(response: httpx.Response) -> str:
    return describe_error(response.status_code, response.content)
