"""A fake device for a real AsyncEngine: it computes tokens by hashing."""

from __future__ import annotations

import time

from tests.engine.fakes import FakeModelRunner, make_loaded, say
from tests.patience import wait_for
from tinyvllm.config import EngineConfig
from tinyvllm.engine.loading import LoadedEngine, Progress
from tinyvllm.scheduling.plan import StepStats

ANSWER = "Grüße, 世界! 👋"


class Device:
    """A fake device that answers everything with ANSWER, and the engine that was loaded around it."""

    def __init__(self) -> None:
        self.runner = FakeModelRunner(num_blocks=64, max_num_seqs=4)
        self.runner.choose = say(ANSWER)
        self.loaded: LoadedEngine | None = None

    def load(self, config: EngineConfig, progress: Progress) -> LoadedEngine:
        self.loaded = make_loaded(self.runner)
        return self.loaded

    def generate_endlessly(self, step_s: float) -> None:
        """Never sample EOS, and take step_s seconds for each step."""
        self.runner.choose = lambda request, digest: 97 + digest % 26
        self.runner.before_step = lambda plan: time.sleep(step_s)

    @property
    def stats(self) -> StepStats:
        assert self.loaded is not None
        return self.loaded.engine.core.stats

    def wait_until_all_blocks_are_free(self) -> None:
        """Wait until every block is free; then audit the pool."""
        idle = lambda stats: stats.num_free_blocks == 63 and not stats.num_running and not stats.num_waiting  # noqa: E731
        wait_for(lambda: idle(self.stats))
        assert self.loaded is not None
        self.loaded.engine.core.scheduler.block_manager.audit()
        assert self.stats.num_free_blocks == 63
