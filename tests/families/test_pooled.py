"""Qwen3 embedding models and rerankers through the server: transformers' embeddings and scores. Expected:
data/qwen3_pooled.json, which write_pooled_reference.py makes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.families.pooled_models import (
    DOCUMENTS,
    QUERY,
    TEXTS,
    write_classifier,
    write_embedder,
    write_reranker,
)
from tests.families.write_pooled_reference import OUTPUT
from tests.server.client import client_of, error_of
from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.engine.async_engine import AsyncEngine

EXPECTED: dict[str, Any] = json.loads(OUTPUT.read_text(encoding="utf-8"))
ATOL = 1e-4


@asynccontextmanager
async def serving(files: ModelFiles) -> AsyncIterator[httpx.AsyncClient]:
    """Prompts come in chunks of 8 tokens, and all steps have as many rows."""
    config = EngineConfig(
        str(files.path),
        dtype="float32",
        kv_cache_dtype="float32",
        max_model_len=768,
        max_num_seqs=8,
        max_num_batched_tokens=8,
        num_gpu_blocks_override=97,
        decode_buckets=(8,),
        token_buckets=(8,),
    )
    engine = AsyncEngine.start(config)
    await engine.wait_ready()
    async with client_of(engine) as client:  # type: ignore[arg-type]
        yield client
    await engine.shutdown()


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_embeddings_are_transformers(tmp_path: Path) -> None:
    """The files say that the last token's state is the embedding, and the tokenizer appends that token. A shortened
    embedding has length 1 again, and relevance is the cosine. What has no head generates nothing."""
    expected = np.array(EXPECTED["embeddings"])
    async with serving(write_embedder(tmp_path / "tiny")) as client:
        answer = await post(client, "/v1/embeddings", input=list(TEXTS))
        assert answer["usage"]["prompt_tokens"] == sum(len(text) + 1 for text in TEXTS)
        np.testing.assert_allclose([item["embedding"] for item in answer["data"]], expected, atol=ATOL)
        (short,) = (await post(client, "/v1/embeddings", input=TEXTS[0], dimensions=16))["data"]
        np.testing.assert_allclose(short["embedding"], expected[0, :16] / np.linalg.norm(expected[0, :16]), atol=ATOL)
        scores = await post(client, "/v1/score", text_1=TEXTS[0], text_2=list(TEXTS))
        assert [item["score"] for item in scores["data"]] == pytest.approx(list(expected @ expected[0]), abs=ATOL)
        refused = await client.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 400 and "use /v1/embeddings" in error_of(refused)["message"]


@pytest.mark.parametrize(("name", "write"), [("reranker", write_reranker), ("classifier", write_classifier)])
async def test_scores_are_transformers(tmp_path: Path, name: str, write: Callable[[Path], ModelFiles]) -> None:
    expected = EXPECTED[name]
    order = sorted(range(len(DOCUMENTS)), key=lambda index: -expected[index])
    async with serving(write(tmp_path / "tiny")) as client:
        scores = await post(client, "/v1/score", text_1=QUERY, text_2=list(DOCUMENTS))
        assert [item["score"] for item in scores["data"]] == pytest.approx(expected, abs=ATOL)
        ranked = await post(client, "/v1/rerank", query=QUERY, documents=list(DOCUMENTS), top_n=2)
        assert [result["index"] for result in ranked["results"]] == order[:2]
        best = ranked["results"][0]
        assert best["relevance_score"] == pytest.approx(expected[order[0]], abs=ATOL)
        assert best["document"] == {"text": DOCUMENTS[order[0]]}
