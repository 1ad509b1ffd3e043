"""A server around a real AsyncEngine with a fake device."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.server.device import Device
from tests.server.fake_engine import serving
from tinyvllm.config import EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def engine(device: Device) -> Iterator[AsyncEngine]:
    engine = AsyncEngine.start(EngineConfig("tiny", served_model_name="tiny"), load=device.load)
    asyncio.run(engine.wait_ready())
    yield engine
    asyncio.run(engine.shutdown())


@pytest.fixture
def url(engine: AsyncEngine) -> Iterator[str]:
    with serving(engine) as address:
        yield address
