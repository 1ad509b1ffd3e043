"""Where a request's time went: in every answer, in the ring of the latest requests, and always adding up."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.engine.fakes import EOS_ID
from tests.server.client import client_of, exchange
from tests.server.device import Device
from tests.server.fake_engine import FakeEngine
from tinyvllm.engine.client import Call, Client
from tinyvllm.engine.output import Delta, Timing
from tinyvllm.engine.step_clock import Parts
from tinyvllm.scheduling.plan import StepPlan
from tinyvllm.server.request_log import MAX_RECORDS, RequestLog, judge_request
from tinyvllm.server.request_times import STAGES, RequestTimes, summarize

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 6},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6},
    "/v1/responses": {"input": "hi", "max_output_tokens": 6},
    "/v1/messages": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6},
    "/api/generate": {"model": "tiny", "prompt": "hi", "stream": False, "options": {"num_predict": 6}},
    "/api/chat": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False},
}


def stages_of(value: str) -> dict[str, float]:
    """The durations of a Server-Timing field, in ms, after a check of its form."""
    metrics = [re.fullmatch(r"([a-z-]+);dur=(\d+\.\d{3})", metric) for metric in value.split(", ")]
    assert all(metrics), value
    return {metric[1]: float(metric[2]) for metric in metrics if metric is not None}


def check_sum(stages: dict[str, float]) -> None:
    total = stages["total"]
    assert sum(ms for name, ms in stages.items() if name != "total") == pytest.approx(total, abs=0.001 * len(stages))


# ---- Dividing ----


def timing_of(rng: random.Random, submitted_s: float, *, has_parts: bool) -> Timing:
    def parts() -> Parts:
        return Parts(*(rng.choice((0.0, rng.random())) for _ in Parts.__struct_fields__))

    queue, prefill, decode = parts(), parts(), parts()
    queued_s = submitted_s + rng.random()
    scheduled_s = queued_s + queue.total_s
    first_token_s = scheduled_s + prefill.total_s
    last_token_s = first_token_s + decode.total_s
    return Timing(
        submitted_s=submitted_s,
        queued_s=queued_s,
        scheduled_s=scheduled_s,
        first_token_s=first_token_s,
        last_token_s=last_token_s,
        num_preemptions=0,
        received_s=last_token_s + rng.random(),
        queue=queue if has_parts else None,
        prefill=prefill if has_parts else None,
        decode=decode if has_parts else None,
    )


def delta_of(timing: Timing, finish_reason: str | None = "stop") -> Delta:
    return Delta(
        index=0,
        text="x",
        token_ids=(1, 2, 3),
        finish_reason=finish_reason,
        num_prompt_tokens=7,
        num_cached_tokens=4,
        num_output_tokens=3,
        timing=timing,
    )


@pytest.mark.parametrize("has_parts", [True, False])
def test_the_stages_divide_the_whole_time(has_parts: bool) -> None:
    rng = random.Random(5)
    for _ in range(200):
        times = RequestTimes(head_s=100.0, template_s=rng.random(), tokenize_s=rng.random())
        times.body_s, times.engine_s = 100.0 + rng.random(), 101.0
        timing = timing_of(rng, 101.0 + 2 * rng.random(), has_parts=has_parts)
        times.note(delta_of(timing), timing.received_s + rng.random())
        end_s = times.taken_s + rng.random()
        seconds = times.divide(end_s)
        assert len(seconds) == len(STAGES) and min(seconds) >= 0.0
        assert sum(seconds) == pytest.approx(end_s - 100.0)
        assert sum(summarize(seconds).values()) == pytest.approx(end_s - 100.0)
        first = sum(s for (phase, _), s in zip(STAGES, seconds, strict=True) if phase == "first token")
        assert first == pytest.approx(timing.first_token_s - timing.scheduled_s)


def test_of_several_choices_the_one_that_ended_last_is_followed() -> None:
    rng, times = random.Random(1), RequestTimes(head_s=0.0)
    times.begin(0.5)
    early, late = (timing_of(rng, at_s, has_parts=True) for at_s in (1.0, 500.0))
    times.note(delta_of(late), 900.0)
    times.note(delta_of(early), 901.0)
    assert times.timing is late and times.num_output_tokens == 6


def test_a_request_that_never_reached_the_engine_has_its_parts_too() -> None:
    times = RequestTimes(head_s=10.0)
    assert sum(times.divide(12.5)) == 2.5
    times.relayed_s = 11.0
    assert summarize(times.divide(12.5)) == {"relay": 1.0}


@pytest.mark.parametrize(
    ("stages", "name"),
    [
        ([("queue", "other prompts", 7.0), ("queue", "decode", 1.0), ("further tokens", "decode", 2.0)], "queue"),
        ([("first token", "prefill", 2.0), ("further tokens", "other prompts", 8.0)], "other prompts"),
        ([("first token", "prefill", 6.0), ("further tokens", "decode", 4.0)], "own prompt"),
        ([("first token", "capture", 6.0), ("further tokens", "decode", 4.0)], "capturing graphs"),
        ([("further tokens", "tokens", 4.0), ("further tokens", "pack", 2.0), ("run", "engine", 4.0)], "host"),
        ([("arrival", "relay", 6.0), ("delivery", "send", 4.0)], "waiting for the model"),
        ([("arrival", "template", 6.0), ("delivery", "send", 4.0)], "reading the request"),
        ([("arrival", "hop", 4.0), ("delivery", "send", 6.0)], "delivery"),
    ],
)
def test_a_request_is_judged_by_what_took_longest(stages: list[tuple[str, str, float]], name: str) -> None:
    verdict = judge_request(stages, 10.0)
    assert verdict.name == name and 0.5 <= verdict.share <= 1.0 and "ms" in verdict.because


def test_the_ring_is_bounded() -> None:
    """In numbers, and in bytes: a kilobyte and a half for each request, whatever its texts."""
    log, timing = RequestLog(), timing_of(random.Random(2), 1.0, has_parts=True)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(MAX_RECORDS + 100):
        times = RequestTimes(head_s=0.0, call_ids=[f"cmpl-{number:032}-{place}" for place in range(50)])
        times.begin(0.5)
        times.note(delta_of(timing), timing.received_s)
        log.add(f"{number:032}", times, "/v1/completions", 200)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(log) == MAX_RECORDS and after - before < 1536 * MAX_RECORDS
    assert log.find(f"{0:032}") is None and log.find(f"cmpl-{MAX_RECORDS:032}") is not None
    assert [one["id"] for one in log.select(2, slowest=False)] == [f"{MAX_RECORDS + n:032}" for n in (99, 98)]


# ---- Over HTTP, around a real engine ----


def test_every_answer_says_where_its_time_went(url: str) -> None:
    for path in BODIES:
        check_answer(url, path)


def check_answer(url: str, path: str) -> None:
    response = httpx.post(url + path, json=BODIES[path])
    assert response.status_code == 200, response.text
    stages = stages_of(response.headers["server-timing"])
    check_sum(stages)
    assert {"parse", "admission", "queue", "prefill", "decode", "host", "total"} <= set(stages)
    assert ("template" in stages) == ("chat" in path or path in ("/v1/responses", "/v1/messages", "/api/generate"))
    waterfall = httpx.get(f"{url}/requests/{response.headers['x-request-id']}").json()
    assert (waterfall["status"] == 200 and waterfall["output_tokens"] == 6) or "api/chat" in path
    assert sum(stage["ms"] for stage in waterfall["stages"]) == pytest.approx(waterfall["total_ms"])
    assert waterfall["total_ms"] >= stages["total"]


def test_a_stream_says_at_its_start_what_is_known(url: str) -> None:
    body = BODIES["/v1/completions"] | {"stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body) as response:
        at_start = stages_of(response.headers["server-timing"])
        assert "trailer" not in response.headers
        response.read()
    check_sum(at_start)
    assert "prefill" in at_start and "queue" in at_start


def test_a_stream_ends_with_the_whole_if_the_client_reads_trailers(url: str) -> None:
    for path in ("/v1/completions", "/v1/messages", "/api/generate"):
        check_trailer(url, path)


def check_trailer(url: str, path: str) -> None:
    answer = exchange(url, path, BODIES[path] | {"stream": True}, "TE: trailers\r\n")
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"\r\ntrailer: server-timing" in head
    body, _, end = rest.rpartition(b"\r\n0\r\n")
    assert body and end.startswith(b"server-timing: ") and end.endswith(b"\r\n\r\n")
    stages = stages_of(end.strip().removeprefix(b"server-timing: ").decode())
    check_sum(stages)
    assert {"decode", "send"} <= set(stages)
    without = exchange(url, path, BODIES[path] | {"stream": True})
    assert b"trailer:" not in without and without.endswith(b"\r\n0\r\n\r\n")


def test_a_waiting_request_is_told_what_for(device: Device, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five requests for four places: the fifth waits in the queue while the others decode. No step runs before the
    fifth has come, however late it does, and none ends before it has waited for 20 steps."""
    num_steps_waited, have_come, submit = 0, threading.Semaphore(0), Client.open

    def open_and_count(client: Client, *call: Any) -> Call:
        opened = submit(client, *call)
        have_come.release()
        return opened

    def before_step(plan: StepPlan) -> None:
        nonlocal num_steps_waited
        assert device.loaded is not None
        if not num_steps_waited:
            for _ in range(5):
                have_come.acquire()
        num_steps_waited += 1
        time.sleep(0.01)

    monkeypatch.setattr(Client, "open", open_and_count)
    device.runner.before_step = before_step
    device.runner.choose = lambda request, digest: EOS_ID if num_steps_waited > 20 else 97 + digest % 26
    bodies = [{"prompt": f"{n}" * 9, "max_tokens": 50, "stream": False} for n in range(5)]
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda body: httpx.post(url + "/v1/completions", json=body, timeout=None), bodies))
    queued = [stages_of(answer.headers["server-timing"]).get("queue", 0.0) for answer in answers]
    assert max(queued) > 150.0, "milliseconds: it waits for 20 steps of 10 at least"
    slowest = httpx.get(url + "/requests", params={"slowest": 1}).json()["requests"][0]
    assert slowest["verdict"]["because"] and slowest["total_ms"] > 200.0


# ---- The route ----


@pytest.fixture
def log_of(url: str) -> Iterator[str]:
    for number in range(3):
        httpx.post(url + "/v1/completions", json=BODIES["/v1/completions"], headers={"x-request-id": f"mine-{number}"})
    yield url


def test_requests_are_listed_and_found_by_either_id(log_of: str) -> None:
    listed = httpx.get(log_of + "/requests").json()["requests"]
    assert [one["id"] for one in listed] == ["mine-2", "mine-1", "mine-0"]
    one = httpx.get(log_of + "/requests", params={"last": 1}).json()["requests"]
    assert one == listed[:1]
    assert httpx.get(log_of + "/requests", params={"slowest": 0}).status_code == 400
    answer_id = listed[0]["call_ids"][0].removesuffix("-0")
    assert httpx.get(f"{log_of}/requests/{answer_id}").json()["id"] == "mine-2"
    unknown = httpx.get(log_of + "/requests/none")
    message = unknown.json()["error"]["message"]
    assert unknown.status_code == 404 and message.startswith("no answered request 'none' is kept"), message


async def test_the_routes_need_the_key() -> None:
    async with client_of(FakeEngine(), api_keys=("secret",)) as client:
        refused = [(await client.get(path)).status_code for path in ("/requests", "/requests/x")]
        known = await client.get("/requests", headers={"authorization": "Bearer secret"})
    assert refused == [401, 401] and known.json() == {"requests": []}


# ---- `timings` in the body ----


def check_timings(timings: dict[str, float], stages: dict[str, float]) -> None:
    """They are the sums of the same stages."""
    parts = ("prefill", "decode", "other-prompts", "tokens", "capture", "host")
    in_engine = sum(stages.get(name, 0.0) for name in parts)
    assert timings["prompt_ms"] + timings["predicted_ms"] == pytest.approx(in_engine, abs=0.01)
    assert timings["queue_ms"] == pytest.approx(stages["queue"], abs=0.002)
    assert (timings["predicted_n"], timings["cache_n"]) == (6, 0)
    assert timings["prompt_per_token_ms"] * timings["prompt_n"] == pytest.approx(timings["prompt_ms"])
    assert timings["predicted_per_second"] == pytest.approx(6e3 / timings["predicted_ms"])


def test_timings_in_the_body_are_from_the_same_accounting(url: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        plain = httpx.post(url + path, json=BODIES[path])
        assert "timings" not in plain.json()
        prompt = {"prompt": "another one"} if path == "/v1/completions" else {}
        asked = httpx.post(url + path, json=BODIES[path] | prompt | {"timings_per_token": True})
        if path == "/v1/completions":
            check_timings(asked.json()["timings"], stages_of(asked.headers["server-timing"]))
        body = BODIES[path] | {"timings_per_token": True, "stream": True}
        lines = httpx.post(url + path, json=body).text.split("\n\n")[:-2]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        timings = [chunk["timings"] for chunk in chunks if "timings" in chunk]
        assert timings[-1]["predicted_n"] == 6 and len(timings) >= 2
        assert all(a["predicted_n"] <= b["predicted_n"] for a, b in itertools.pairwise(timings))
