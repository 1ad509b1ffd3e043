"""Each point of the engine fails once in turn, and at random in pairs, while requests of all kinds run.

Afterwards the pools' audit passes, every request has ended with an answer or a reason, the next one is answered right
(the device of integers checks every slot that it reads), and nothing is left. Triples at random:

    pytest -m slow tests/faults/test_engine.py
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from tests.faults.rounds import NUM_BLOCKS, NUM_STATES, OK, Rounds, start_fake_engine
from tests.sweeps import swept
from tinyvllm.faults import ENGINE, NOTHING, POINTS, REQUEST, Fault, planned

# The points that an engine in one process passes.
HERE = sorted(
    point
    for point in POINTS
    if point.startswith(("engine.", "pool.", "state.", "grammar.", "beam."))
    or point in ("hop.submit", "hop.abort", "hop.arrive", "text.detokenize")
)
HOWS = ("os", "memory", "device")


class Subject:
    """An engine that is replaced when it has died."""

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self.num_deaths = 0

    async def __aenter__(self) -> Subject:
        await self._start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.rounds.engine.shutdown()

    async def _start(self) -> None:
        self.rounds = Rounds(start_fake_engine(self._max_in_flight))
        await self.rounds.engine.wait_ready()
        assert await self.rounds.answers() == OK
        self.reached = await self._reach()
        self._before = await self.rounds.left()

    async def _reach(self) -> dict[str, int]:
        """The points that a round reaches, and how often. Nothing fails."""
        with planned() as plan:
            outcomes = await self.rounds.run()
        assert set(outcomes.values()) == {OK}, outcomes
        return dict(plan.reached)

    async def survive(self, faults: Sequence[Fault]) -> dict[str, str]:
        """Run a round under a plan, and check what is left; returns how the requests ended."""
        with planned(*faults) as plan:
            outcomes = await self.rounds.run()
            engine = self.rounds.engine
            if engine.error is not None:
                assert any(POINTS[fault.point].ends == ENGINE for fault in plan.happened) or len(faults) > 1, outcomes
                assert not engine.is_ready and set(outcomes.values()) != {OK}
                await engine.shutdown()
        if engine.error is not None:
            self.num_deaths += 1
            await self._start()
            return outcomes
        if plan.happened:
            assert await self.rounds.answers() == OK, (faults, outcomes)
        left = await self.rounds.left()
        assert left["free_blocks"] == left["all_blocks"] == NUM_BLOCKS - 1 and left["live_states"] == 0, (faults, left)
        assert left["requests"] == left["owned_requests"] == left["waiting_calls"] == 0, (faults, left)
        assert left["calls"] == left["choices"] == 0, (faults, left)
        assert left["tasks"] == self._before["tasks"] and left["threads"] <= self._before["threads"], (faults, left)
        return outcomes


async def sweep(max_in_flight: int, rng: random.Random, places: Sequence[float]) -> None:
    """Let each point fail once at each of `places`, from the first occurrence in a round (0) to the last (1)."""
    async with Subject(max_in_flight) as subject:
        assert set(subject.reached) >= set(HERE), set(HERE) - set(subject.reached)
        for point in HERE:
            for place in places:
                at = 1 + round(place * (subject.reached[point] - 1) * 0.8)  # faults make rounds shorter
                outcomes = await subject.survive([Fault(point, rng.choice(HOWS), at=at)])
                failed = [kind for kind, outcome in outcomes.items() if outcome != OK]
                if POINTS[point].ends == NOTHING:
                    assert not failed, (point, outcomes)
                if POINTS[point].ends == REQUEST:
                    assert len(failed) <= 1, (point, outcomes)


@pytest.mark.parametrize("max_in_flight", swept((1, 2), [2]))
async def test_each_point_fails_once(max_in_flight: int) -> None:
    assert NUM_STATES
    await sweep(max_in_flight, random.Random(max_in_flight), (0.0, 0.5))


async def fail_at_random(num_rounds: int, num_faults: int, seed: int) -> None:
    rng = random.Random(seed)
    async with Subject(1 + seed % 2) as subject:
        for _ in range(num_rounds):
            points = rng.sample(HERE, num_faults)
            await subject.survive(
                [
                    Fault(p, rng.choice(HOWS), at=rng.randint(1, subject.reached[p]), times=rng.randint(1, 2))
                    for p in points
                ]
            )


async def test_pairs_fail_at_random() -> None:
    await fail_at_random(12, 2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(4))
async def test_triples_fail_at_random(seed: int) -> None:
    await fail_at_random(200, 3, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("max_in_flight", [1, 2])
async def test_each_point_fails_at_many_places(max_in_flight: int) -> None:
    await sweep(max_in_flight, random.Random(0), [step / 10 for step in range(11)])


if __name__ == "__main__":
    asyncio.run(fail_at_random(1000, 2, seed=0))
