"""A request may end at any stage, by its client or a failing device. What it held is free after the next step."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from tests.patience import PATIENCE_S, wait_for
from tests.server.client import raw_post
from tests.server.device import Device


class Hold:
    """Blocks the engine before each step until the test lets it continue."""

    def __init__(self, device: Device) -> None:
        self.reached, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        device.runner.before_step = self._wait

    def _wait(self, plan: object) -> None:
        self.reached.release()
        assert self._permits.acquire(timeout=PATIENCE_S)

    def let(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._permits.release()

    def wait(self) -> None:
        assert self.reached.acquire()


@contextlib.contextmanager
def client_that_leaves(url: str, body: dict[str, object]) -> Iterator[None]:
    """A client that has sent a request, and leaves at the end of the block."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as sock:
        sock.sendall(raw_post("/v1/completions", body))
        yield


def wait_for_departure(device: Device, url: str) -> None:
    """Wait until the server has noticed: the abort is then in the engine's inbox until the step ends."""
    metric = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 1.0'
    wait_for(lambda: metric in httpx.get(url + "/metrics").text)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_in_the_prompt_frees_its_blocks_at_the_next_step(device: Device, url: str, stream: bool) -> None:
    hold = Hold(device)
    budget = device.runner.capacity.max_num_batched_tokens
    with client_that_leaves(url, {"prompt": "x" * (3 * budget), "max_tokens": 9, "stream": stream}):
        hold.wait()
        hold.let(1)
        hold.wait()  # the second of three chunks is about to be computed
    wait_for_departure(device, url)
    hold.let(1)
    device.wait_until_all_blocks_are_free()
    assert len(device.runner.plans) == 2  # the third chunk was never computed


def test_leaving_in_the_output_frees_its_blocks_at_the_next_step(device: Device, url: str) -> None:
    device.generate_endlessly(step_s=0)
    hold = Hold(device)
    with client_that_leaves(url, {"prompt": "x", "max_tokens": 100, "stream": True}):
        for _ in range(5):
            hold.wait()
            hold.let(1)
        hold.wait()
    wait_for_departure(device, url)
    hold.let(1)
    device.wait_until_all_blocks_are_free()
    assert len(device.runner.plans) == 6


def test_a_client_that_reads_nothing_delays_nobody(device: Device, url: str) -> None:
    device.generate_endlessly(step_s=0)
    with contextlib.ExitStack() as idle:
        for number in range(3):  # of 4 places
            body = {"prompt": f"{number}", "max_tokens": 200, "stream": True}
            idle.enter_context(client_that_leaves(url, body))
        answer = httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 20})
        assert answer.json()["usage"]["completion_tokens"] == 20
        device.wait_until_all_blocks_are_free()  # the engine has finished them, though nobody has read a byte


def test_a_device_that_keeps_failing_is_reported_and_nobody_waits_for_it(device: Device, url: str) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("lost the device at /dev/dri/card0")

    device.runner.before_step = fail
    statuses = []
    for _ in range(5):
        response = httpx.post(url + "/v1/completions", json={"prompt": "x"})
        statuses.append((response.status_code, response.json()["error"]["code"]))
        assert "/dev" not in response.text
    assert statuses[:2] == [(500, "generation_failed")] * 2 and statuses[-1] == (503, "engine_dead")
    for path in ("/health", "/ready", "/v1/models"):
        assert httpx.get(url + path).status_code == 503
    assert httpx.get(url + "/engine/state").json()["status"] == "dead"
    assert httpx.get(url + "/metrics").status_code == 200


def test_a_step_that_runs_out_of_memory_fails_its_requests_alone(device: Device, url: str) -> None:
    def fail(plan: object) -> None:
        device.runner.before_step = lambda plan: None
        raise MemoryError

    device.runner.before_step = fail
    first = httpx.post(url + "/v1/completions", json={"prompt": "x", "stream": True})
    assert first.status_code == 500 or "MemoryError" in json.dumps(first.text)
    assert httpx.post(url + "/v1/completions", json={"prompt": "x"}).status_code == 200
    assert httpx.get(url + "/health").status_code == 200
    device.wait_until_all_blocks_are_free()
