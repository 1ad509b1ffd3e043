"""/metrics: vLLM's names, types, labels and buckets, and correct counts."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import httpx
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.server.client import client_of
from tests.server.fake_engine import TIMING, FakeEngine, serving
from tinyvllm.config import MAX_SPECULATIVE_TOKENS, BlockGroup, EngineConfig, MemoryUse
from tinyvllm.scheduling.plan import StepStats, count_step
from tinyvllm.server.app import make_app
from tinyvllm.server.metrics import token_count_buckets
from tinyvllm.server.status_log import StatusReporter

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
    assert value_of(families, "tinyvllm:graphs_to_capture") == 2
    assert value_of(families, "tinyvllm:general_operations") == 5
    assert value_of(families, "tinyvllm:failed_graph_captures_total") == 1


async def test_memory_is_shown_by_kind() -> None:
    engine = FakeEngine()
    memory = MemoryUse(weights=1000, scratch=200, kv_groups=(300, 40), state_slot=7)
    engine.capacity = replace(
        engine.capacity, other_groups=(BlockGroup(9, 64),), num_state_slots=11, checkpoint_interval=3, memory=memory
    )
    engine.statistics.num_live_states, engine.statistics.num_checkpoints = 2, 5
    engine.statistics.num_checkpoint_hits, engine.statistics.num_checkpoint_evictions = 6, 4
    async with client_of(engine) as client:
        families = await scrape(client)
        state = (await client.get("/engine/state")).json()
    kinds = {sample.labels["kind"]: sample.value for sample in families["tinyvllm:memory_bytes"].samples}
    assert kinds == {
        "weights": 1000, "scratch": 200, "kv": 300, "kv window 64": 40,
        "states live": 14, "states checkpoints": 35, "states free": 21,
    }  # fmt: skip
    assert state["memory"] == kinds and state["counts"]["num_live_states"] == 2
    assert value_of(families, "tinyvllm:checkpoint_hits_total") == 6
    assert value_of(families, "tinyvllm:checkpoint_evictions_total") == 4


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


async def test_two_apps_keep_their_own_counts() -> None:
    async with client_of(FakeEngine(reply="abc")) as busy, client_of(FakeEngine(reply="abc")) as idle:
        await busy.post("/v1/completions", json={"prompt": "xx"})
        assert value_of(await scrape(busy), "vllm:generation_tokens_total") == 3
        assert value_of(await scrape(idle), "vllm:generation_tokens_total") == 0


def test_client_that_left_counts_as_an_abort() -> None:
    engine = FakeEngine(hang_after=2)
    with serving(engine) as url:
        body = {"prompt": "a", "n": 2, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body) as response:
            next(response.iter_raw())
        engine.wait_until(lambda: not engine.running)
        text = httpx.get(url + "/metrics").text
    assert 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 2.0' in text


# The families that vLLM's dashboard queries (examples/observability/prometheus_grafana/grafana.json), and those of
# vllm/v1/metrics/loggers.py that a text model on one device has. Type, and labels besides model_name and engine.
VLLM_FAMILIES = {
    "vllm:num_requests_running": ("gauge", set()),
    "vllm:num_requests_waiting": ("gauge", set()),
    "vllm:num_requests_waiting_by_reason": ("gauge", {"reason"}),
    "vllm:kv_cache_usage_perc": ("gauge", set()),
    "vllm:engine_sleep_state": ("gauge", {"sleep_state"}),
    "vllm:prompt_tokens": ("counter", set()),
    "vllm:prompt_tokens_cached": ("counter", set()),
    "vllm:prompt_tokens_by_source": ("counter", {"source"}),
    "vllm:generation_tokens": ("counter", set()),
    "vllm:request_success": ("counter", {"finished_reason"}),
    "vllm:num_preemptions": ("counter", set()),
    "vllm:prefix_cache_queries": ("counter", set()),
    "vllm:prefix_cache_hits": ("counter", set()),
    "vllm:corrupted_requests": ("counter", set()),
    "vllm:time_to_first_token_seconds": ("histogram", set()),
    "vllm:inter_token_latency_seconds": ("histogram", set()),
    "vllm:request_time_per_output_token_seconds": ("histogram", set()),
    "vllm:e2e_request_latency_seconds": ("histogram", set()),
    "vllm:request_queue_time_seconds": ("histogram", set()),
    "vllm:request_inference_time_seconds": ("histogram", set()),
    "vllm:request_prefill_time_seconds": ("histogram", set()),
    "vllm:request_decode_time_seconds": ("histogram", set()),
    "vllm:request_prompt_tokens": ("histogram", set()),
    "vllm:request_generation_tokens": ("histogram", set()),
    "vllm:request_max_num_generation_tokens": ("histogram", set()),
    "vllm:request_params_max_tokens": ("histogram", set()),
    "vllm:request_params_n": ("histogram", set()),
    "vllm:request_num_preemptions": ("histogram", set()),
    "vllm:request_prefill_kv_computed_tokens": ("histogram", set()),
    "vllm:iteration_tokens_total": ("histogram", set()),
}  # fmt: skip


async def test_every_family_of_vllm_is_there_from_the_first_scrape_on() -> None:
    async with client_of(FakeEngine()) as client:
        families = await scrape(client)
    for name, (kind, more) in VLLM_FAMILIES.items():
        assert families[name].type == kind, name
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == {"model_name", "engine"} | more, name
    info = families["vllm:cache_config_info"].samples[0]
    assert info.value == 1 and info.labels["num_gpu_blocks"] == "101" and info.labels["block_size"] == "16"
    assert {"http_requests", "http_request_duration_seconds"} <= set(families)
    assert sys.platform != "linux" or "process_resident_memory_bytes" in families
    assert any(name.startswith("python_gc_") for name in families)


async def test_our_dashboard_queries_metrics_that_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text(encoding="utf-8")
    board = json.loads(text)
    async with client_of(FakeEngine()) as client:
        await client.post("/v1/completions", json={"prompt": "x"})
        families = await scrape(client)
    samples = {sample.name for family in families.values() for sample in family.samples}
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    asked = {name for expression in expressions for name in re.findall(r"(?:(?:tiny)?vllm:|http_)\w+", expression)}
    assert asked and asked <= samples, asked - samples
    assert {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in asked} >= {
        "vllm:e2e_request_latency_seconds", "vllm:time_to_first_token_seconds", "vllm:kv_cache_usage_perc",
    }  # fmt: skip


async def test_times_and_sizes_of_a_request_are_counted() -> None:
    async with client_of(FakeEngine(reply="abc")) as client:
        await client.post("/v1/completions", json={"prompt": "xxxxxx", "n": 2, "max_tokens": 7})
        families = await scrape(client)
    for name, total, count in (
        ("request_queue_time_seconds", 1.0, 2),
        ("request_prefill_time_seconds", 2.0, 2),
        ("request_decode_time_seconds", 4.0, 2),
        ("request_inference_time_seconds", 6.0, 2),
        ("request_time_per_output_token_seconds", 4.0 / 2, 2),
        ("request_num_preemptions", 1, 2),
        ("request_prompt_tokens", 6, 2),
        ("request_prefill_kv_computed_tokens", 2, 2),
        ("request_generation_tokens", 3, 2),
        ("request_params_max_tokens", 7, 2),
        ("request_max_num_generation_tokens", 3, 1),
        ("request_params_n", 2, 1),
    ):
        assert value_of(families, f"vllm:{name}_sum") == total * count, name
        assert value_of(families, f"vllm:{name}_count") == count, name
    assert value_of(families, "vllm:prompt_tokens_cached_total") == 4
    assert value_of(families, "vllm:prompt_tokens_by_source_total", source="local_compute") == 2
    assert value_of(families, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 4
    assert value_of(families, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer") == 0


async def test_prompt_tokens_from_host_memory_or_disk_have_a_source_of_their_own() -> None:
    engine = FakeEngine(reply="abc", first_timing=replace(TIMING, num_restored_tokens=3))
    async with client_of(engine) as client:
        await client.post("/v1/completions", json={"prompt": "xxxxxx", "n": 2})
        families = await scrape(client)
    sources = {"local_compute": 2, "local_cache_hit": 1, "external_kv_transfer": 3}
    for source, count in sources.items():
        assert value_of(families, "vllm:prompt_tokens_by_source_total", source=source) == count, source


async def test_sizes_have_buckets_up_to_the_context_length() -> None:
    async with client_of(FakeEngine(max_model_len=300)) as client:
        families = await scrape(client)
    samples = families["vllm:request_prompt_tokens"].samples
    found = [float(sample.labels["le"]) for sample in samples if sample.name.endswith("_bucket")]
    assert found == [1, 2, 5, 10, 20, 50, 100, 200, float("inf")]
    assert token_count_buckets(500)[-1] == 500 and token_count_buckets(1) == (1,)


async def test_steps_are_counted_by_their_tokens() -> None:
    engine = FakeEngine()
    for num_tokens in (7, 30, 32):
        engine.statistics.step_sizes = count_step(engine.statistics.step_sizes, num_tokens)
    engine.statistics.extra["num_computed_tokens"] = 69
    async with client_of(engine) as client:
        families = await scrape(client)
    assert value_of(families, "vllm:iteration_tokens_total_count") == 3
    assert value_of(families, "vllm:iteration_tokens_total_sum") == 69
    samples = families["vllm:iteration_tokens_total"].samples
    found = {float(s.labels["le"]): s.value for s in samples if s.name.endswith("_bucket")}
    assert (found[1.0], found[8.0], found[16.0], found[32.0], found[16384.0]) == (0, 1, 1, 3, 3)


async def test_answers_are_counted_by_route_and_status() -> None:
    async with client_of(FakeEngine()) as client:
        await client.post("/v1/completions", json={"prompt": "x"})
        await client.post("/v1/completions", json={"prompt": 7})
        await client.get("/v1/models/tiny")
        await client.get("/nowhere/at/all")
        for method in ("BREW", "STEEP"):
            await client.request(method, "/v1/completions")
        await client.get("/health")
        families = await scrape(client)
    counts = {tuple(s.labels.values()): s.value for s in families["http_requests"].samples if s.name.endswith("_total")}
    assert counts == {
        ("/v1/completions", "POST", "2xx"): 1,
        ("/v1/completions", "POST", "4xx"): 1,
        ("/v1/models/{model_id:path}", "GET", "2xx"): 1,
        ("none", "GET", "4xx"): 1,
        ("/v1/completions", "other", "4xx"): 2,
    }
    assert value_of(families, "tinyvllm:requests_refused_total", reason="invalid") == 1


async def test_the_status_line_is_that_of_vllm_and_silent_when_idle() -> None:
    engine = FakeEngine(reply="abc")
    app = make_app(engine)  # type: ignore[arg-type]
    state = app.state.server
    reporter = StatusReporter(engine, state.metrics)  # type: ignore[arg-type]
    line = reporter.line()
    assert line is not None and re.fullmatch(
        r"Engine 000: Avg prompt throughput: 0\.0 tokens/s, Avg generation throughput: 0\.0 tokens/s, Running: 2 reqs, "
        r"Waiting: 1 reqs, GPU KV cache usage: 50\.0%, Prefix cache hit rate: 75\.0%",
        line,
    )
    engine.statistics = StepStats(num_free_blocks=100)
    assert reporter.line() is not None  # one more line, which shows that the engine is idle
    assert reporter.line() is None
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.post("/v1/completions", json={"prompt": "xx"})
    line = reporter.line()
    assert line is not None and not re.search(r"generation throughput: 0\.0 ", line)


async def test_drafts_are_counted_as_in_vllm() -> None:
    engine = FakeEngine()  # with up to three drafted tokens
    reporter = StatusReporter(engine, make_app(engine).state.server.metrics)  # type: ignore[arg-type]
    assert reporter.drafts() is None
    positions = (30, 20, 10) + (0,) * (MAX_SPECULATIVE_TOKENS - 3)
    engine.statistics = StepStats(
        num_drafts=40, num_draft_tokens=120, num_accepted_tokens=60, accepted_per_position=positions
    )
    async with client_of(engine) as client:
        families = await scrape(client)
        state = (await client.get("/engine/state")).json()
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    assert [value_of(families, f"vllm:spec_decode_{name}_total") for name in names] == [40, 120, 60]
    name = "vllm:spec_decode_num_accepted_tokens_per_pos"
    assert {s.labels["position"]: s.value for s in families[name].samples if s.name.endswith("_total")} == {
        "0": 30,
        "1": 20,
        "2": 10,
    }
    assert (state["counts"]["num_draft_tokens"], state["counts"]["num_accepted_tokens"]) == (120, 60)
    line = reporter.drafts()
    assert line is not None and re.fullmatch(
        r"SpecDecoding metrics: Mean acceptance length: 2\.50, Accepted throughput: [\d.]+ tokens/s, Drafted "
        r"throughput: [\d.]+ tokens/s, Accepted: 60 tokens, Drafted: 120 tokens, Per-position acceptance rate: "
        r"0\.750, 0\.500, 0\.250, Avg Draft acceptance rate: 50\.0%",
        line,
    )
    assert reporter.drafts() is None
    engine.config = EngineConfig("tiny")
    async with client_of(engine) as client:
        assert not [name for name in await scrape(client) if "spec_decode" in name]
