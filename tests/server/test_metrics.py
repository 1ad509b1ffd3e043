"""/metrics: vLLM's names, types, labels and buckets, and true counts."""

from __future__ import annotations

import httpx
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fake_engine import FakeEngine, serving
from tests.server.test_routes import client_of
from tinyvllm.server.app import make_app

LABELS = {"model_name": "tiny", "engine": "0"}


async def scrape(client: httpx.AsyncClient) -> dict[str, Metric]:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def value_of(families: dict[str, Metric], sample_name: str, **labels: str) -> float:
    (value,) = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == sample_name and sample.labels == LABELS | labels
    ]
    return float(value)


async def test_requests_are_counted() -> None:
    async with client_of(FakeEngine(reply="abc")) as client:
        await client.post("/v1/completions", json={"prompt": ["xx", "yyy"], "n": 2})
        await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        families = await scrape(client)
    assert value_of(families, "vllm:prompt_tokens_total") == 6
    assert value_of(families, "vllm:generation_tokens_total") == 4 * 3 + 2
    assert value_of(families, "vllm:request_success_total", finished_reason="stop") == 4
    assert value_of(families, "vllm:request_success_total", finished_reason="length") == 1
    assert value_of(families, "vllm:request_success_total", finished_reason="abort") == 0
    assert value_of(families, "vllm:time_to_first_token_seconds_count") == 5
    assert value_of(families, "vllm:inter_token_latency_seconds_count") == 4 * 2 + 1
    assert value_of(families, "vllm:e2e_request_latency_seconds_count") == 5


async def test_counts_of_the_engine_are_shown() -> None:
    async with client_of(FakeEngine()) as client:
        families = await scrape(client)
    assert value_of(families, "vllm:num_requests_running") == 2
    assert value_of(families, "vllm:num_requests_waiting") == 1
    assert value_of(families, "vllm:kv_cache_usage_perc") == 0.5
    assert value_of(families, "vllm:num_preemptions_total") == 3
    assert value_of(families, "vllm:prefix_cache_queries_total") == 40
    assert value_of(families, "vllm:prefix_cache_hits_total") == 30
    assert value_of(families, "tinyvllm:graph_captures_total") == 7


async def test_names_types_and_buckets_are_those_of_vllm() -> None:
    async with client_of(FakeEngine()) as client:
        families = await scrape(client)
    # fmt: off
    ttft = [.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560]
    itl = [.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
    e2e = [.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
    # fmt: on
    for name, bounds in (("time_to_first_token", ttft), ("inter_token_latency", itl), ("e2e_request_latency", e2e)):
        family = families[f"vllm:{name}_seconds"]
        assert family.type == "histogram"
        found = [sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")]
        assert [float(bound) for bound in found] == [*bounds, float("inf")]
    for name in ("prompt_tokens", "generation_tokens", "request_success", "num_preemptions", "prefix_cache_hits"):
        assert families[f"vllm:{name}"].type == "counter"
    assert families["vllm:kv_cache_usage_perc"].type == "gauge"


async def test_scraping_works_while_the_engine_loads() -> None:
    engine = FakeEngine(is_ready=False)
    async with client_of(engine) as client:
        assert "vllm:kv_cache_usage_perc" not in await scrape(client)
        engine.is_ready = True
        assert "vllm:kv_cache_usage_perc" in await scrape(client)


def test_two_apps_keep_their_own_counts() -> None:
    make_app(FakeEngine())  # type: ignore[arg-type]
    make_app(FakeEngine())  # type: ignore[arg-type]


def test_client_that_left_counts_as_an_abort() -> None:
    engine = FakeEngine(hang_after=2)
    with serving(engine) as url:
        body = {"prompt": "a", "n": 2, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body) as response:
            next(response.iter_raw())
        engine.wait_until(lambda: not engine.running)
        text = httpx.get(url + "/metrics").text
    assert 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 2.0' in text
