"""The application on Ray, on two nodes on one machine: pytest -m ray tests/test_ray_app.py (with the extra `ray`).

Clients ask without a pause while a replica is killed and while all replicas are replaced. Each knows its answers from
before, since sampling is greedy, so an answer that has lost or repeated a token is found.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.builders import write_tiny_hf_llama

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parent.parent
PATIENCE = {  # a busy machine starts Ray's processes slowly
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
PROMPTS = [f"person {n} asks about " + "the weather in spring and " * 4 for n in range(8)]
MAX_TOKENS = 40


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def node(*flags: str) -> Iterator[None]:
    """A Ray node in a process of its own, with everything that it starts."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--node-ip-address=127.0.0.1"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def wait_until(condition: Any, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    os.environ.update(PATIENCE)
    port = free_port()
    with node("--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=4"):
        wait_until(lambda: can_connect(port))
        environment = {"env_vars": {"PYTHONPATH": str(ROOT), "DEV": "CPU"}}
        wait_until(lambda: try_init(f"127.0.0.1:{port}", environment))
        with node(f"--address=127.0.0.1:{port}", "--num-cpus=2"):
            wait_until(lambda: sum(found["Alive"] for found in ray.nodes()) == 2)
            yield
            ray.shutdown()


def try_init(address: str, environment: dict[str, Any]) -> bool:
    import ray

    try:
        ray.init(address=address, runtime_env=environment, logging_level="error", log_to_driver=False)
    except (ConnectionError, RuntimeError):
        return False
    return True


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = tmp_path_factory.mktemp("models") / "tiny"
    model.mkdir()
    write_tiny_hf_llama(model)
    engine = {"max_num_batched_tokens": 64, "max_model_len": 512, "warm_up": "background", "cpu_cores": 1}
    engine["num_gpu_blocks_override"] = 400
    return {"model": str(model), "min_replicas": 2, "max_replicas": 2, "max_num_seqs": 4, "engine": engine}


@pytest.fixture(scope="module")
def url(cluster: None, options: dict[str, Any]) -> Iterator[str]:
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    deploy(options)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def deploy(options: dict[str, Any]) -> None:
    from ray import serve

    from tinyvllm.ray_app import build

    serve.run(build(options))


def replicas() -> list[str]:
    """Names of the live actors that run engines."""
    from ray.util import list_named_actors

    found = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    return [name for name in found if "#Replica#" in name]


def whole(client: httpx.Client, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def stream(client: httpx.Client, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    text, ids = "", set()
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                text += event["choices"][0]["text"]
                ids.add(event["id"])
            elif line == "data: [DONE]":
                assert len(ids) == 1, ids
                return text
    raise AssertionError(f"the stream has no end after {text!r}")


@dataclass
class Crowd:
    """Clients that ask one after the other, half of them for streams, until the block ends."""

    url: str
    expected: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.is_over.set()
            for thread in threads:
                thread.join()

    def _ask(self, number: int) -> None:
        prompt, ask = PROMPTS[number], (whole, stream)[number % 2]
        with httpx.Client(base_url=self.url, timeout=300) as client:
            while not self.is_over.is_set():
                try:
                    is_right = ask(client, prompt) == self.expected[prompt]
                except (AssertionError, httpx.HTTPError) as error:
                    self.counts["lost"] += 1
                    self.errors.append(f"{type(error).__name__}: {error}"[:300])
                else:
                    self.counts["answered" if is_right else "wrong"] += 1


@pytest.fixture(scope="module")
def expected(url: str) -> dict[str, str]:
    with httpx.Client(base_url=url, timeout=300) as client:
        return {prompt: whole(client, prompt) for prompt in PROMPTS}


def test_events_arrive_one_by_one(url: str, expected: dict[str, str]) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=300) as response:
        events = [line for line in response.iter_lines() if line.startswith("data: {")]
    assert len(events) > MAX_TOKENS // 2


def test_errors_and_other_routes_pass_through(url: str, expected: dict[str, str]) -> None:
    assert httpx.get(url + "/v1/models", timeout=60).json()["data"][0]["id"] == "tiny"
    answer = httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": -1}, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "max_tokens"


def test_a_conversation_is_found_in_the_cache_of_its_replica(url: str, expected: dict[str, str]) -> None:
    history = "a long talk about many things, " * 6
    with httpx.Client(base_url=url, timeout=300) as client:
        for turn in range(6):
            body = {"prompt": history, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            answer = client.post("/v1/completions", json=body).json()
            num_cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert num_cached >= (len(history) - 60 if turn else 0)
            history += "and so on. "


def test_prompts_of_different_adapters_have_different_hashes() -> None:
    from tinyvllm.ray_app import prepare

    def hashes(**fields: Any) -> list[int]:
        return prepare("/v1/completions", json.dumps({"prompt": "a" * 200, **fields}).encode())[1]

    assert hashes(model="sql") == hashes(model="sql") and not set(hashes(model="sql")) & set(hashes(model="poet"))
    assert hashes() and hashes(model=["sql"]) == hashes()  # which the replica refuses


def test_a_killed_replica_loses_no_request(url: str, expected: dict[str, str]) -> None:
    import ray

    crowd = Crowd(url, expected)
    with crowd.asking():
        for _ in range(2):
            wait_until(lambda: len(replicas()) == 2)
            before = crowd.counts["answered"]
            wait_until(lambda before=before: crowd.counts["answered"] > before + 16)
            ray.kill(ray.get_actor(replicas()[0], namespace="serve"))
            before = crowd.counts["answered"]
            wait_until(lambda before=before: crowd.counts["answered"] > before + 16)
    print("killed two replicas:", dict(crowd.counts))
    assert crowd.counts["answered"] > 64
    assert not crowd.errors and not crowd.counts["wrong"]


def test_a_rolling_update_loses_no_request(url: str, expected: dict[str, str], options: dict[str, Any]) -> None:
    wait_until(lambda: len(replicas()) == 2)
    before = set(replicas())
    crowd = Crowd(url, expected)
    with crowd.asking():
        wait_until(lambda: crowd.counts["answered"] > 16)
        deploy({**options, "engine": {**options["engine"], "seed": 1}})
        wait_until(lambda: len(replicas()) == 2 and not before & set(replicas()))
        num_answered = crowd.counts["answered"]
        wait_until(lambda: crowd.counts["answered"] > num_answered + 16)
    print("replaced two replicas:", dict(crowd.counts))
    assert not crowd.errors and not crowd.counts["wrong"]
