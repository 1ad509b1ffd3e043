"""A front-end whose engine is fake, for the supervisor's tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from tests.server.fake_engine import FakeEngine
from tinyvllm.engine.output import Delta
from tinyvllm.errors import EngineDeadError
from tinyvllm.server import front_end
from tinyvllm.server.specs import FrontEndSpec


class RemoteEngine(FakeEngine):
    """Answers with the front-end's name. The prompt "hang" hangs until a shutdown, or until the file `go` appears."""

    async def generate(self, prompt_ids: list[int], *arguments: Any, **options: Any) -> AsyncGenerator[Delta, None]:
        is_hanging = bytes(prompt_ids) == b"hang"
        async for delta in super().generate(prompt_ids, *arguments, **options):
            yield delta
            while is_hanging and delta.num_output_tokens == 2:
                await asyncio.sleep(0.01)
                if self.error is not None:
                    raise self.error
                if self.has_shut_down:
                    raise EngineDeadError("the server is stopping")
                if (Path(self.config.model) / "go").exists():
                    break

    def engine_died(self, engine: int, reason: str) -> None:
        self.error = EngineDeadError(reason)

    def engine_started(self, engine: int) -> None:
        self.error = None


def connect(spec: FrontEndSpec) -> Any:
    engine = RemoteEngine(reply=f"{spec.name}.", served_model_name="tiny")
    engine.config = spec.config
    if spec.config.served_model_name == "slow":  # like a large tokenizer that is read on a thread
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 1000)
    return engine, engine


if __name__ == "__main__":
    front_end.main(connect)
