"""The processes of a server with fake engines: started, watched, drained, restarted and ended together."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from tests.patience import PATIENCE_S
from tests.server.servers import RunningServer, running_server
from tests.server.test_control import wait_until_gone
from tests.sweeps import swept

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see which process did what")

BODY = {"prompt": "x", "max_tokens": 100}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Shared by the tests that leave it as it was."""
    with running_server(num_front_ends=2) as server:
        server.wait_until_ready()
        yield server


def ask(server: RunningServer, prompt: str = "x") -> str:
    """Ask over a connection of its own; the fake engine answers with the name of the front-end."""
    response = httpx.post(server.address + "/v1/completions", json={**BODY, "prompt": prompt})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@contextlib.contextmanager
def hanging(server: RunningServer) -> Iterator[tuple[str, Iterator[str]]]:
    """A stream in the middle of its answer: its front-end, and the lines that are still to come."""
    body = {**BODY, "prompt": "hang", "stream": True}
    with httpx.stream("POST", server.address + "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert "f" in next(lines)
        yield front_end_of(server, response), lines


def front_end_of(server: RunningServer, response: httpx.Response) -> str:
    """The front-end that has the other end of the response's connection."""
    port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
    for _ in range(100):  # the kernel's table may miss a line while connections come and go
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        inodes = {f"socket:[{row[9]}]" for row in rows if row[2].endswith(f":{port:04X}")}
        for name, pid in server.pids().items():
            if name.startswith("front-end") and inodes & open_files(pid):
                return name
        time.sleep(0.01)
    raise AssertionError(f"no front-end has port {port}")


def open_files(pid: int) -> set[str]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(path))
    return found


def value_of(text: str, sample: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{sample} ")]
    return float(line.rpartition(" ")[2])


# ---- As one server ----


def test_connections_are_spread_evenly(server: RunningServer) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.address)) for _ in range(8)]
        names = [client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] for client in clients]
        assert Counter(names) == {"front-end 0.": 4, "front-end 1.": 4}


def test_metrics_of_any_front_end_are_the_sums_over_all(server: RunningServer) -> None:
    sample = 'vllm:generation_tokens_total{engine="0",model_name="tiny"}'
    before = value_of(httpx.get(server.address + "/metrics").text, sample)
    assert {ask(server) for _ in range(6)} == {"front-end 0.", "front-end 1."}
    for _ in range(4):
        text = httpx.get(server.address + "/metrics").text
        assert value_of(text, sample) == before + 6 * 12
        for name in ("supervisor", "engine 0", "front-end 0", "front-end 1"):
            assert value_of(text, f'process_resident_memory_bytes{{process="{name}"}}') > 1e6
        assert value_of(text, 'tinyvllm:event_loop_lag_seconds_count{process="front-end 1"}') > 0
        assert text.count("# TYPE vllm:generation_tokens_total ") == 1
    state = httpx.get(server.address + "/engine/state").json()
    assert state["counts"]["num_output_tokens"] == before + 6 * 12
    assert state["ttft_s"]["p50"] > 0 and state["status"] == "ready"


def test_each_process_says_which_it_is_and_keeps_no_secret_where_others_see_it() -> None:
    key = "a-key-of-the-test"
    os.environ["TINYVLLM_API_KEY"] = key
    try:
        with running_server(is_forked=False, num_front_ends=1, settings={"api_keys": [key]}) as server:
            server.wait_until_ready()
            assert httpx.post(server.address + "/v1/completions", json=BODY).status_code == 401
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.post(server.address + "/v1/completions", json=BODY, headers=headers).status_code == 200
            for name, pid in server.pids().items():
                if name != "supervisor":
                    seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
                    assert key.encode() not in seen, name
            assert server.run_dir.stat().st_mode & 0o777 == 0o700
            server.stop()
    finally:
        del os.environ["TINYVLLM_API_KEY"]


@pytest.mark.sweep  # by default, at the board that they share: test_board.py
def test_limits_hold_for_all_front_ends_together() -> None:
    with running_server(settings={"max_num_queued_requests": 2}) as server:  # of 4 sequences at once
        server.wait_until_ready()
        with contextlib.ExitStack() as stack:
            names = [stack.enter_context(hanging(server))[0] for _ in range(6)]
            assert Counter(names) == {"front-end 0": 3, "front-end 1": 3}
            for _ in range(4):
                refused = httpx.post(server.address + "/v1/completions", json=BODY)
                assert refused.status_code == 429 and "2 requests are queued" in refused.text
        server.wait_for(lambda: httpx.post(server.address + "/v1/completions", json=BODY).status_code == 200)
        server.stop()


def test_https_over_handed_over_connections(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    files = {"certfile": str(tmp_path / "cert.pem"), "keyfile": str(tmp_path / "key.pem")}
    certificate.cert_chain_pems[0].write_to_path(files["certfile"])
    certificate.private_key_pem.write_to_path(files["keyfile"])
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with running_server(tls=files) as server:
        server.wait_until_ready()
        assert server.address.startswith("https://")
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(httpx.Client(base_url=server.address, verify=context)) for _ in range(4)]
            names = [client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] for client in clients]
        assert Counter(names) == {"front-end 0.": 2, "front-end 1.": 2}
        with pytest.raises(httpx.TransportError):
            httpx.get(server.address.replace("https", "http") + "/health")
        server.stop()


@pytest.mark.sweep
def test_a_unix_socket_is_shared_too(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with running_server(uds=path) as server:
        server.wait_until_ready()
        assert server.address == f"unix:{path}"
        with contextlib.ExitStack() as stack:
            names = set()
            for _ in range(2):
                transport = httpx.HTTPTransport(uds=path)
                client = stack.enter_context(httpx.Client(base_url="http://localhost", transport=transport))
                names.add(client.post("/v1/completions", json=BODY).json()["choices"][0]["text"])
        assert names == {"front-end 0.", "front-end 1."}
        server.stop()


# ---- Deaths ----


def test_a_killed_front_end_loses_its_own_requests_only_and_is_started_again() -> None:
    with running_server(settings={"max_num_queued_requests": 0}) as server:
        server.wait_until_ready()
        ask(server)
        pids = server.pids()
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(hanging(server)) for _ in range(4)]
            os.kill(pids["front-end 0"], signal.SIGKILL)
            server.wait_for(lambda: server.pids().get("front-end 0", pids["front-end 0"]) != pids["front-end 0"])
            num_lost = 0
            (server.model_dir / "go").touch()
            for name, lines in streams:
                try:
                    assert list(lines)[-2:] == ["data: [DONE]", ""] and name == "front-end 1"
                except httpx.TransportError:
                    num_lost += 1
                    assert name == "front-end 0"
            assert num_lost == 2
        heard = server.run_dir / "heard-0"
        server.wait_for(lambda: heard.read_text().startswith("front-end-0.0\n"))
        assert {ask(server) for _ in range(8)} >= {"front-end 1."}
        server.wait_for(lambda: ask(server) == "front-end 0.")  # their places are free again, too
        text = httpx.get(server.address + "/metrics").text
        sample = 'vllm:generation_tokens_total{engine="0",model_name="tiny"}'
        assert value_of(text, sample) >= 9 * 12  # what the dead one had counted is still there
        server.stop()
        assert any("front-end 0 was killed by SIGKILL" in line for line in server.log)


def test_a_front_end_that_stands_still_is_started_again() -> None:
    with running_server(num_front_ends=1, unseen_s=3.0) as server:
        server.wait_until_ready()
        pid = server.pids()["front-end 0"]
        os.kill(pid, signal.SIGSTOP)
        server.wait_for(lambda: server.pids().get("front-end 0", pid) != pid)
        server.wait_for(lambda: ask(server) == "front-end 0.")
        assert any(re.match(r"front-end 0 has stood still for \d+ s, and is killed", line) for line in server.log)
        server.stop()


def test_a_front_end_that_dies_again_and_again_ends_the_server() -> None:
    with running_server() as server:
        server.wait_until_ready()
        pid = 0
        while server.process.poll() is None:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, KeyError):
                new = server.pids()["front-end 1"]
                if new != pid:
                    os.kill(new, signal.SIGKILL)
                    pid = new
            time.sleep(0.01)
        assert server.wait() == 1
        assert "front-end 1 has died 5 times in a row" in server.events[-1]["text"]
        assert not server.run_dir.exists()


def test_a_dead_engine_ends_the_server_with_an_error() -> None:
    """Clients hear of it until then: here, until a signal ends the wait for them."""
    with running_server(num_front_ends=1, engine_exit_s=PATIENCE_S) as server:
        server.wait_until_ready()
        with hanging(server) as (_, lines):
            os.kill(server.pids()["engine 0"], signal.SIGKILL)
            answers: list[httpx.Response] = []

            def is_refused() -> bool:
                answers.append(httpx.post(server.address + "/v1/completions", json=BODY))
                return answers[-1].status_code == 503

            server.wait_for(is_refused)
            assert answers[-1].json()["error"]["code"] == "engine_dead"
            server.signal()
            rest = "\n".join(lines)
        assert "engine 0 was killed by SIGKILL" in rest
        assert server.wait() == 1
        assert "engine 0 was killed by SIGKILL" in server.events[-1]["text"]


def test_a_server_ends_with_its_engine_though_children_of_that_live_on() -> None:
    with running_server(num_front_ends=1, load="forks") as server:
        server.wait_until_ready()
        with hanging(server) as (_, lines):
            os.kill(server.pids()["engine 0"], signal.SIGKILL)
            assert "engine 0 was killed by SIGKILL" in "\n".join(lines)
        assert server.wait() == 1


@pytest.mark.sweep
def test_an_engine_that_dies_during_the_drain_decides_the_exit_code() -> None:
    with running_server(num_front_ends=1) as server:
        server.wait_until_ready()
        with hanging(server) as (_, lines):
            server.signal()
            server.wait_for_status("/ready", 503)
            os.kill(server.pids()["engine 0"], signal.SIGKILL)
            assert "engine 0 was killed by SIGKILL" in "\n".join(lines)
        assert server.wait() == 1
        assert "engine 0 was killed by SIGKILL" in server.events[-1]["text"]
        assert sum("engine 0 was killed" in line for line in server.log) == 1
        assert not any("Traceback" in line or "while the server stops" in line for line in server.log)


@pytest.mark.sweep  # by default, an engine that is ready: the test of other engines
def test_a_server_waits_for_an_engine_that_loads_when_another_dies() -> None:
    with running_server(num_front_ends=1, num_engines=2, load="slow second") as server:
        server.wait_until_ready()
        os.kill(server.pids()["engine 0"], signal.SIGKILL)
        server.wait_for(lambda: "engine 0" not in server.pids())
        time.sleep(1.3)
        assert server.process.poll() is None
        (server.model_dir / "load").touch()
        server.wait_for((server.model_dir / "ready 1").exists)
        os.kill(server.pids()["engine 1"], signal.SIGKILL)
        assert server.wait() == 1
        assert "engine 1 was killed by SIGKILL" in server.events[-1]["text"]


@pytest.mark.sweep  # by default, with a real front-end: test_processes.py
def test_a_dead_engine_is_started_again_if_asked_for() -> None:
    with running_server(restart_engine=True) as server:
        server.wait_until_ready()
        pid = server.pids()["engine 0"]
        os.kill(pid, signal.SIGKILL)
        server.wait_for(lambda: server.pids().get("engine 0", pid) != pid)
        server.wait_for_status("/ready", 200)
        assert {ask(server) for _ in range(4)} == {"front-end 0.", "front-end 1."}
        server.stop()


def test_other_engines_go_on_without_a_dead_one() -> None:
    with running_server(num_front_ends=1, num_engines=2) as server:
        server.wait_until_ready()
        server.wait_for((server.model_dir / "ready 1").exists)  # the fake front-end waits for no engine
        os.kill(server.pids()["engine 1"], signal.SIGKILL)
        server.wait_for(lambda: "engine 1" not in server.pids())
        time.sleep(1.2)
        assert server.process.poll() is None
        server.stop()


def test_an_engine_that_cannot_load_ends_the_server_with_its_error() -> None:
    with running_server(num_front_ends=1, load="fails") as server:
        assert server.wait() == 1
        assert server.events[-1] == {"event": "error", "text": "the model cannot be loaded"}
        assert not server.run_dir.exists()


def test_nothing_outlives_a_killed_supervisor() -> None:
    with running_server(num_front_ends=1) as server:
        server.wait_until_ready()
        pids = list(server.pids().values())
        assert len(pids) == 3
        server.process.kill()
        wait_until_gone(pids[1:])
        server.wait()
    with running_server(num_front_ends=1) as another:  # and the next server removes the directory
        assert another.run_dir != server.run_dir and not server.run_dir.exists()
        another.stop()


# ---- Stopping ----


def is_draining(client: httpx.Client) -> bool:
    return client.get("/ready").status_code == 503


def test_a_signal_turns_new_work_away_at_every_front_end_until_all_requests_are_answered() -> None:
    with running_server(settings={"shutdown_timeout_s": PATIENCE_S}) as server:
        server.wait_until_ready()
        with hanging(server) as (_, lines), contextlib.ExitStack() as stack:
            server.signal()
            clients: dict[str, httpx.Client] = {}
            while len(clients) < 2:
                client = stack.enter_context(httpx.Client(base_url=server.address))
                with client.stream("GET", "/health") as response:
                    clients[front_end_of(server, response)] = client
                    assert response.status_code == 200
                    response.read()  # else its connection would be closed
            for client in clients.values():
                server.wait_for(functools.partial(is_draining, client))
                refused = client.post("/v1/completions", json=BODY)
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_draining"
            assert httpx.get(server.address + "/ready").status_code == 503
            assert httpx.get(server.address + "/engine/state").json()["status"] == "draining"
            (server.model_dir / "go").touch()
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert server.wait() == 0
        assert "stopping: 1 requests may continue for up to 120 s; a second signal stops at once\n" in server.log
        assert not server.run_dir.exists()


@pytest.mark.parametrize(("timeout_s", "num_signals"), swept([(0.3, 1), (1000.0, 2)], [(1000.0, 2)]))
def test_what_still_runs_after_the_time_or_a_second_signal_is_aborted(timeout_s: float, num_signals: int) -> None:
    with running_server(num_front_ends=1, settings={"shutdown_timeout_s": timeout_s}) as server:
        server.wait_until_ready()
        with hanging(server) as (_, lines):
            server.signal(signal.SIGINT)
            if num_signals == 2:  # the system would make one of both
                server.wait_for(lambda: any("a second signal stops at once" in line for line in server.log))
                server.signal(signal.SIGINT)
            assert "the server is stopping" in "\n".join(lines)
        assert server.wait() == 0


@pytest.mark.sweep  # test_ends.py stops one that compiles
def test_a_stop_while_the_engine_loads_is_clean() -> None:
    with running_server(num_front_ends=1) as server:
        server.signal()
        assert server.wait() == 0
        assert not server.run_dir.exists()


@pytest.mark.sweep
def test_a_stop_does_not_wait_for_the_threads_of_a_front_end() -> None:
    with running_server(num_front_ends=1, config={"served_model_name": "slow"}) as server:
        server.wait_until_ready()
        server.stop()
        assert not any("is killed" in line for line in server.log)


@pytest.mark.sweep
def test_a_second_signal_does_not_wait_long_for_a_front_end_that_stands_still() -> None:
    with running_server(num_front_ends=1, is_patient=False) as server:
        server.wait_until_ready()
        os.kill(server.pids()["front-end 0"], signal.SIGSTOP)
        for _ in range(2):
            server.signal()
            time.sleep(0.1)
        assert server.wait() == 0
        assert "a front-end does not end, and is killed\n" in server.log


def test_an_engine_whose_step_does_not_end_is_killed_after_a_second_signal() -> None:
    with running_server(num_front_ends=1, load="hangs", haste_s=0.2) as server:
        server.wait_until_ready()
        pid = server.pids()["engine 0"]
        server.signal()
        server.wait_for(lambda: "front-end 0" not in server.pids())
        time.sleep(0.2)
        assert server.process.poll() is None  # one signal waits for it
        server.signal()
        assert server.wait() == 1
        wait_until_gone([pid])


def test_signals_to_the_children_are_left_to_the_supervisor(server: RunningServer) -> None:
    pids = server.pids()
    for name, pid in pids.items():
        if name != "supervisor":
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
    assert {ask(server) for _ in range(4)} == {"front-end 0.", "front-end 1."}
    assert server.pids() == pids


def test_the_run_directory_is_shared_memory_with_a_short_path(server: RunningServer) -> None:
    assert len(os.fsencode(server.run_dir / "engine-00")) <= 100
    assert json.loads((server.run_dir / "processes.json").read_text())["supervisor"] == server.process.pid
    assert threading.active_count() < 50
