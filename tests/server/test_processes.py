"""Engine processes with a fake device and front-ends with a real tokenizer: a server as it is, without a model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.builders import write_byte_tokenizer
from tests.server.client import read_answer
from tests.server.fake_load import ANSWER
from tests.server.servers import RunningServer, running_server
from tests.server.test_supervisor import front_end_of, value_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see which process did what")

REAL = {"front_end_module": "tinyvllm.server.front_end", "engine_module": "tinyvllm.server.engine_process"}
LONG = {"prompt": "x", "max_tokens": 150, "stream": True}


@contextlib.contextmanager
def serving(directory: Path, load: str, **options: Any) -> Iterator[RunningServer]:
    write_byte_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = {"model": str(directory), "enable_prefix_caching": True}
    with running_server(**{**REAL, "load": f"tests.server.fake_load:{load}", "config": config, **options}) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    settings = {"enable_profiling": True}
    with serving(tmp_path_factory.mktemp("model"), "answering", num_engines=2, settings=settings) as server:
        yield server
        server.stop()


@contextlib.contextmanager
def streaming(server: RunningServer, body: dict[str, object] = LONG) -> Iterator[tuple[str, Iterator[str]]]:
    """A stream that has begun: its front-end, and its further lines."""
    with httpx.stream("POST", server.address + "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        yield front_end_of(server, response), lines


def running(server: RunningServer) -> float:
    text = httpx.get(server.address + "/metrics").text
    return sum(value_of(text, line.rpartition(" ")[0]) for line in text.splitlines() if "requests_running{" in line)


# ---- As in one process ----


def test_every_front_end_answers_with_the_same_text(server: RunningServer) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}
    for stream in (False, True):
        for _ in range(4):
            response = httpx.post(server.address + "/v1/chat/completions", json={**chat, "stream": stream})
            assert response.status_code == 200, response.text
            if stream:
                events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
                choices = [choice for event in events for choice in json.loads(event)["choices"]]
                text = "".join(choice["delta"].get("content", "") for choice in choices)
            else:
                text = response.json()["choices"][0]["message"]["content"]
            assert text == ANSWER


def test_tokens_logprobs_choices_and_errors_cross_the_processes(server: RunningServer) -> None:
    with httpx.Client(base_url=server.address) as client:
        assert client.post("/tokenize", json={"prompt": "ab"}).json()["tokens"] == [97, 98]
        body = {"prompt": ["a", "b"], "max_tokens": 3, "n": 1, "logprobs": 1}
        answer = client.post("/v1/completions", json=body).json()
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
        assert all(len(choice["logprobs"]["tokens"]) == 3 for choice in answer["choices"])
        refused = client.post("/v1/completions", json={"prompt": "x" * 500})
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"


def test_the_page_and_the_metrics_show_all_engines(server: RunningServer) -> None:
    for _ in range(2):
        state = httpx.get(server.address + "/engine/state").json()
        assert state["status"] == "ready" and state["limits"]["num_blocks"] == 126
        assert state["counts"]["num_free_blocks"] == 126 and len(state["pool"]["held"]) == 126
        assert state["steps"] and state["itl_s"]["p50"] >= 0
        text = httpx.get(server.address + "/metrics").text
        for engine in "01":
            assert value_of(text, f'vllm:num_requests_running{{engine="{engine}",model_name="tiny"}}') == 0
            assert value_of(text, f'process_cpu_seconds_total{{process="engine {engine}"}}') > 0
        computed = [line for line in text.splitlines() if line.startswith("tinyvllm:computed_tokens_total{")]
        assert sum(float(line.rpartition(" ")[2]) for line in computed) > 0


def test_a_recording_covers_every_process(server: RunningServer) -> None:
    with httpx.Client(base_url=server.address) as one, httpx.Client(base_url=server.address) as other:
        assert one.post("/start_profile").json()["status"] == "recording"
        for client in (one, other):
            assert client.post("/start_profile").status_code == 409
            client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
        trace = other.post("/stop_profile", params={"format": "trace"}).json()
    rows = {
        event["args"]["name"].partition(" (")[0] for event in trace["traceEvents"] if event["name"] == "process_name"
    }
    assert rows >= {"front-end 0", "front-end 1"} and any(row.startswith("engine") for row in rows)
    assert {"step", "detokenize"} <= {event["name"] for event in trace["traceEvents"]}
    assert httpx.post(server.address + "/stop_profile").status_code == 409


def test_large_bodies_are_parsed_by_a_front_end_of_their_own(tmp_path: Path) -> None:
    headers = {"content-type": "application/json", "connection": "close"}
    small = json.dumps({"prompt": "hello", "max_tokens": 5}).encode()
    with serving(tmp_path, "answering", has_large_lane=True, log_level="info") as server:
        with httpx.Client(base_url=server.address, headers=headers) as client:
            for body in (small, small.ljust(300_000), small.ljust(300_000), small):
                response = client.post("/v1/completions", content=body)
                assert response.status_code == 200, response.text
                assert response.json()["usage"]["completion_tokens"] == 5
                assert ("relay;dur=" in response.headers["server-timing"]) == (len(body) > 2**18)
                found = client.get(f"/requests/{response.headers['x-request-id']}").json()
                assert found["process"] == "front-end 2" or len(body) < 2**18
            too_large = client.post("/v1/completions", content=small.ljust(17 * 2**20))
            assert too_large.status_code == 413 and "larger than" in too_large.json()["error"]["message"]
            requests = 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}'
            assert value_of(client.get("/metrics").text, requests) == 4, "each is counted once"
        refusals = '"POST /v1/completions HTTP/1.1" 413'
        server.wait_for(lambda: any(refusals in line for line in server.log))  # before its process dies with the rest
        os.kill(server.pids()["front-end 2"], signal.SIGKILL)
        server.wait_for(
            lambda: (
                httpx.post(
                    server.address + "/v1/completions", content=small.ljust(300_000), headers=headers
                ).status_code
                == 200
            )
        )
        server.stop()
        lines = [line for line in server.log if refusals in line]
        assert len(lines) == 1 and "127.0.0.1:" in lines[0], "one access line, with the client's address"


# by default, bodies that stall in test_large_lane.py, and stops that streams hold up in test_supervisor.py
@pytest.mark.sweep
def test_a_stop_ends_stalled_bodies_with_an_error(tmp_path: Path) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    texts = (
        f"{head}Content-Length: 1000\r\n\r\n{{",
        f"{head}Content-Length: 400000\r\n\r\n{{",
        f"{head}Transfer-Encoding: chunked\r\n\r\n5\r\n{{    \r\n",
    )
    settings = {"shutdown_timeout_s": 1000}
    with (
        serving(tmp_path, "answering", has_large_lane=True, num_front_ends=1, settings=settings) as server,
        contextlib.ExitStack() as stack,
    ):
        url = urlsplit(server.address)
        socks = [stack.enter_context(socket.create_connection((url.hostname, url.port))) for _ in texts]
        for sock, text in zip(socks, texts, strict=True):
            sock.sendall(text.encode())
        time.sleep(0.5)  # until they wait for the rest
        server.stop()  # long before --shutdown-timeout
        for sock in socks:
            answer = read_answer(sock).decode()
            assert answer.startswith("HTTP/1.1 503") and "server_draining" in answer
        assert "Traceback" not in "".join(server.log)


def test_a_stored_response_is_known_at_every_front_end(server: RunningServer) -> None:
    with httpx.Client(base_url=server.address) as one, httpx.Client(base_url=server.address) as other:
        first = one.post("/v1/responses", json={"input": "hi"}).json()
        for client in (one, other):
            assert client.get(f"/v1/responses/{first['id']}").json() == first
            body = {"input": "more", "previous_response_id": first["id"], "max_output_tokens": 3}
            assert client.post("/v1/responses", json=body).json()["usage"]["input_tokens"] > len(ANSWER.encode())
        assert other.delete(f"/v1/responses/{first['id']}").status_code == 200
        for client in (one, other):
            assert client.get(f"/v1/responses/{first['id']}").status_code == 404
            assert client.delete(f"/v1/responses/{first['id']}").status_code == 404


def test_where_a_request_s_time_went_is_known_at_every_front_end(server: RunningServer) -> None:
    with httpx.Client(base_url=server.address) as one, httpx.Client(base_url=server.address) as other:
        sent = [
            client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 5}, headers={"x-request-id": name})
            for client, name in ((one, "from-one"), (other, "from-other"))
        ]
        assert all("prefill;dur=" in answer.headers["server-timing"] for answer in sent)
        for client in (one, other):
            waterfalls = [client.get(f"/requests/{name}").json() for name in ("from-one", "from-other")]
            assert {waterfall["process"] for waterfall in waterfalls} == {"front-end 0", "front-end 1"}
            for waterfall in waterfalls:
                stages = [stage["ms"] for stage in waterfall["stages"]]
                assert sum(stages) == pytest.approx(waterfall["total_ms"]) and waterfall["output_tokens"] == 5
            listed = [one["id"] for one in client.get("/requests", params={"last": 2}).json()["requests"]]
            assert listed == ["from-other", "from-one"]
            assert client.get("/requests/nobody").status_code == 404


# ---- Deaths ----


@pytest.mark.sweep  # by default, with fake processes: test_supervisor.py
def test_a_dead_front_end_frees_what_its_requests_held_at_the_engine(tmp_path: Path) -> None:
    with serving(tmp_path, "endless") as server, contextlib.ExitStack() as stack:
        streams = [stack.enter_context(streaming(server)) for _ in range(6)]
        names = [name for name, _ in streams]
        assert set(names) == {"front-end 0", "front-end 1"}
        os.kill(server.pids()["front-end 1"], signal.SIGKILL)
        server.wait_for(lambda: running(server) == names.count("front-end 0"))
        ends = {name: [] for name in names}  # type: ignore[var-annotated]
        for name, lines in streams:
            try:
                ends[name].append(list(lines)[-2])
            except httpx.TransportError:
                ends[name].append("lost")
        assert set(ends["front-end 0"]) == {"data: [DONE]"} and set(ends["front-end 1"]) == {"lost"}
        server.wait_for(lambda: httpx.get(server.address + "/engine/state").json()["counts"]["num_free_blocks"] == 63)
        server.stop()


def test_a_dead_engine_ends_its_streams_with_an_error_and_comes_back(tmp_path: Path) -> None:
    with serving(tmp_path, "slow", restart_engine=True, num_front_ends=1) as server:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(streaming(server)) for _ in range(4)]
            os.kill(server.pids()["engine 0"], signal.SIGKILL)
            for _, lines in streams:
                rest = "\n".join(lines)
                assert "engine 0 was killed by SIGKILL" in rest and '"code": "engine_dead"' in rest.replace(
                    '":"', '": "'
                )
        server.wait_for_status("/ready", 200)
        for _ in range(4):
            response = httpx.post(server.address + "/v1/completions", json={"prompt": "x", "max_tokens": 3})
            assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 3
        server.stop()


@pytest.mark.sweep  # by default, with fake processes: test_supervisor.py
def test_another_engine_takes_over_from_a_dead_one(tmp_path: Path) -> None:
    with serving(tmp_path, "endless", num_engines=2) as server:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(streaming(server)) for _ in range(6)]
            os.kill(server.pids()["engine 1"], signal.SIGKILL)
            ends = ["engine 1 was killed" in "\n".join(lines) for _, lines in streams]
        assert 0 < sum(ends) < 6
        time.sleep(0.1)
        for _ in range(4):
            response = httpx.post(server.address + "/v1/completions", json={"prompt": "x", "max_tokens": 3})
            assert response.status_code == 200
        assert httpx.get(server.address + "/health").status_code == 200
        state = httpx.get(server.address + "/engine/state").json()
        assert state["status"] == "ready" and state["counts"]["num_running"] == 0
        server.stop()


@pytest.mark.sweep  # by default, with fake processes: test_supervisor.py
def test_a_drain_answers_what_runs_and_a_second_signal_aborts_it(tmp_path: Path) -> None:
    with serving(tmp_path, "endless") as server, contextlib.ExitStack() as stack:
        short = [stack.enter_context(streaming(server, {**LONG, "max_tokens": 40})) for _ in range(2)]
        long = [stack.enter_context(streaming(server, {**LONG, "max_tokens": 240})) for _ in range(2)]
        server.signal()
        assert all(list(lines)[-2] == "data: [DONE]" for _, lines in short)
        server.signal()
        assert all("aborted" in "\n".join(lines) for _, lines in long)
        assert server.wait() == 0 and not server.run_dir.exists()
