"""What a recording costs, and the residual, where steps are short: `python -m tests.bench.served_fake`.

A server around a fake device whose steps take 2 ms, so that more of a request's time is the server's than with a model.
"""

from __future__ import annotations

import asyncio

from tests.server.device import Device
from tests.server.fake_engine import serving
from tinyvllm.bench.load import Load, LoadWork, Target
from tinyvllm.bench.served import measure_served
from tinyvllm.config import EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine

WORK = LoadWork(num_requests=96, num_warmup=4, input_len=16, output_len=32)
NUM_REPEATS = 3


def main() -> None:
    device = Device()
    device.generate_endlessly(step_s=0.002)
    engine = AsyncEngine.start(EngineConfig("tiny", served_model_name="tiny"), load=device.load)
    asyncio.run(engine.wait_ready())
    with serving(engine, enable_profiling=True) as url:
        for _ in range(NUM_REPEATS):
            for level in measure_served(Target(url, "tiny"), WORK, [Load(1), Load(4)], lambda *_: None):
                figures = level.as_json()
                print(
                    f"{figures['concurrency']} clients: {level.plain['output_tok_s']:.0f} tok/s, recording costs "
                    f"{level.overhead_share:+.1%}, residual {figures['residual_share']:.2%}"
                )
    asyncio.run(engine.shutdown())


if __name__ == "__main__":
    main()
