"""The routes about the prefix cache, and the metrics of the tiers below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.builders import write_tiny_hf_llama
from tests.server.client import CHAT, client_of, error_of
from tests.server.fake_engine import FakeEngine
from tests.server.test_metrics import scrape, value_of
from tinyvllm.config import EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.scheduling.tiers import COUNTS
from tinyvllm.server.status_log import StatusReporter


async def test_how_much_of_a_prompt_is_cached_can_be_asked() -> None:
    async with client_of(FakeEngine()) as client:
        for body in ({"prompt": "abcdefgh"}, {"prompt": list(b"abcdefgh")}):
            answer = (await client.post("/prefix_cache", json=body)).json()
            assert answer["prompt_tokens"] == answer["cached_tokens"] == 8
            assert answer["engines"] == [
                {"engine": 0, "device": 0, "host": 0, "disk": 4},
                {"engine": 1, "device": 0, "host": 4, "disk": 8},
            ]
        chat = (await client.post("/prefix_cache", json=CHAT)).json()
        assert chat["prompt_tokens"] > 8
        salted = await client.post("/prefix_cache", json={"prompt": "abcdefgh", "cache_salt": "s"})
        assert salted.json()["cached_tokens"] == 0
        wrong: list[tuple[dict[str, Any], str]] = [
            ({}, "prompt"),
            ({"prompt": "a", **CHAT}, "prompt"),
            ({"prompt": [257]}, "prompt"),
            ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
        ]
        for body, param in wrong:
            response = await client.post("/prefix_cache", json=body)
            assert response.status_code == 400 and str(error_of(response)["param"]).startswith(param), body


async def test_the_cache_is_reset_with_vllms_parameters() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        for query in ("", "?reset_external=true", "?reset_running_requests=true&reset_external=false"):
            response = await client.post(f"/reset_prefix_cache{query}")
            assert response.status_code == 200 and not response.content
        assert (await client.post("/reset_prefix_cache?reset_external=5")).status_code == 400
    assert engine.resets == [False, True, False]


async def test_tiers_have_metrics_and_a_place_in_the_status_line() -> None:
    engine = FakeEngine()
    engine.config = EngineConfig("tiny", kv_offloading_size=1.0)
    engine.statistics.extra = {name: float(number) for number, name in enumerate(COUNTS, 10)}
    async with client_of(engine) as client:
        families = await scrape(client)
    assert value_of(families, "vllm:external_prefix_cache_queries_total") == 10
    assert value_of(families, "vllm:external_prefix_cache_hits_total") == 11 + 12
    assert value_of(families, "tinyvllm:kv_tier_hits_total", tier="disk") == 12
    assert value_of(families, "vllm:kv_offload_total_bytes_total", transfer_type="GPU_to_CPU") == 15
    assert value_of(families, "tinyvllm:kv_tier_bytes", tier="host") == 23
    totals: Any = type("", (), {"num_prompt_tokens": 0, "num_cached_tokens": 0, "num_output_tokens": 0})
    reporter = StatusReporter(engine, type("", (), {"totals": totals}))  # type: ignore[arg-type]
    engine.statistics.extra = dict.fromkeys(COUNTS, 4.0)
    assert "External prefix cache hit rate: 200.0%" in str(reporter.line())


async def test_a_real_engine_answers_both(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "tiny")
    config = EngineConfig(
        str(files.path),
        max_model_len=64,
        max_num_seqs=1,
        max_num_batched_tokens=32,
        decode_buckets=(1,),
        token_buckets=(32,),
        num_gpu_blocks_override=6,
        kv_disk_cache=str(tmp_path / "kv"),
    )
    engine = AsyncEngine.start(config)
    try:
        async with client_of(engine) as client:  # type: ignore[arg-type]
            await engine.wait_ready()
            ids = list(range(3, 50))
            body = {"prompt": ids, "max_tokens": 1, "cache_salt": "ours"}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            asked = {"prompt": ids, "cache_salt": "ours"}
            assert (await client.post("/prefix_cache", json=asked)).json()["engines"][0]["device"] == 32
            assert (await client.post("/prefix_cache", json={"prompt": ids})).json()["cached_tokens"] == 0
            await client.post("/reset_prefix_cache?reset_external=true")
            assert (await client.post("/prefix_cache", json=asked)).json()["cached_tokens"] == 0
    finally:
        await engine.shutdown()
