"""A real server of the default model, for real clients. These tests need the extra `clients`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.fake_engine import serving
from tinyvllm.config import EngineConfig, ModelFiles


@pytest.fixture(scope="session")
def server_url(smollm2_files: ModelFiles) -> Iterator[str]:
    """The server's base URL, ending in /v1."""
    import asyncio

    from tinyvllm.engine.async_engine import AsyncEngine

    config = EngineConfig(
        str(smollm2_files.path), served_model_name="smol", max_model_len=2048, max_num_seqs=4, decode_buckets=(4,)
    )
    engine = AsyncEngine.start(config)
    asyncio.run(engine.wait_ready())
    with serving(engine) as url:
        yield url + "/v1"
    asyncio.run(engine.shutdown())
