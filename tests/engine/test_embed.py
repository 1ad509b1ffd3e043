"""A text's embedding is the pooled hidden states of an independent llama, whatever else runs."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest

from tests.builders import TinyLlama, make_weights, write_tiny_hf_llama
from tests.engine.test_sampling import SETTINGS
from tests.model.test_llama import numpy_llama
from tests.sweeps import swept
from tinyvllm.config import EngineConfig, ModelFiles, SamplingParams
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.errors import ContextLengthError, RequestError

MODEL = TinyLlama(seed=5)
WEIGHTS = make_weights(MODEL)
PROMPTS = [
    list(text) for text in (b"x", b"to be or not to be, that is the question", b"ababab", b"to be or not to be!")
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_tiny_hf_llama(tmp_path_factory.mktemp("models") / "embed", seed=MODEL.seed)


def start(files: ModelFiles, **settings: Any) -> AsyncEngine:
    """With few blocks and short steps: prompts come in pieces, and some are preempted."""
    config = EngineConfig(
        str(files.path),
        **SETTINGS,
        **settings,
    )
    return AsyncEngine.start(config)


def expected(prompt: list[int], pooling: str) -> np.ndarray:
    """The states are what the head turns into the logits that NumPy's llama gives."""
    head = WEIGHTS["model.embed_tokens.weight" if MODEL.tie else "lm_head.weight"].astype(np.float64)
    states = np.linalg.lstsq(head, numpy_llama(MODEL, WEIGHTS, prompt).T, rcond=None)[0].T  # (T, hidden)
    pooled = states.mean(axis=0) if pooling == "mean" else states[-1]
    return pooled / np.linalg.norm(pooled)


@pytest.mark.parametrize(
    ("pooling", "overlaps"),
    swept(itertools.product(["mean", "last"], [False, True]), [("mean", True), ("last", False)]),
)
async def test_embeddings_are_pooled_states_beside_requests_that_generate(
    files: ModelFiles, pooling: str, overlaps: bool
) -> None:
    engine = start(files, async_scheduling=overlaps)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)

    async def generate() -> list[int]:
        deltas = [delta async for delta in engine.generate(PROMPTS[1][:9], params, request_id="text")]
        return [token_id for delta in deltas for token_id in delta.token_ids]

    async def embed(prompt: list[int], name: str) -> np.ndarray:
        return await engine.embed(prompt, pooling, request_id=name)

    alone = await generate()
    generating = asyncio.create_task(generate())
    found = await asyncio.gather(*[embed(prompt, f"e{i}") for i, prompt in enumerate(PROMPTS * 2)])
    assert await generating == alone
    for prompt, embedding in zip(PROMPTS * 2, found, strict=True):
        np.testing.assert_allclose(embedding, expected(prompt, pooling), atol=2e-4)
        assert embedding.dtype == np.float32 and abs(np.linalg.norm(embedding) - 1) < 1e-5
    assert engine.stats().num_free_blocks == SETTINGS["num_gpu_blocks_override"] - 1
    await engine.shutdown()


async def test_what_cannot_be_embedded_is_refused(files: ModelFiles) -> None:
    engine = start(files)
    with pytest.raises(RequestError, match="pooling is 'max': choose one of mean, cls, last"):
        await engine.embed([1], "max", request_id="a")
    with pytest.raises(RequestError, match="empty"):
        await engine.embed([], request_id="b")
    with pytest.raises(ContextLengthError):
        await engine.embed([1] * 64, request_id="c")
    await engine.shutdown()
