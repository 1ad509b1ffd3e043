"""A simulated fleet: real schedulers and KV pools behind a router, and people who talk to it. Counts steps, not time.

All engines step together. People wait for an answer, think, and ask again with the whole conversation as the prompt.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tinyvllm.config import Capacity, SamplingParams
from tinyvllm.engine.routing import Route, Router, sample_hashes, short_hashes
from tinyvllm.scheduling.block_hashes import hash_blocks
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.plan import StepOutput
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.scheduler import Scheduler

BLOCK_SIZE = 16
VOCAB_SIZE = 32000
Choose = Callable[[Router, Sequence[int], int], object]


@dataclass
class Person:
    """Has conversations, one after another: some turns each, all with one of the service's system prompts."""

    rng: random.Random
    system_prompts: list[list[int]]
    history: list[int] = field(default_factory=list)
    num_turns_left: int = 0
    wakes_at: int = 0  # the step in which the next turn starts
    route: Route | None = None

    def ask(self) -> tuple[list[int], int]:
        """The next prompt, and the length of its answer."""
        if self.num_turns_left == 0:
            self.history, self.num_turns_left = list(self.rng.choice(self.system_prompts)), self.rng.randint(2, 8)
        self.num_turns_left -= 1
        self.history += self.rng.choices(range(VOCAB_SIZE), k=self.rng.randint(10, 150))
        return list(self.history), self.rng.randint(10, 150)


class SimulatedEngine:
    """A scheduler with a pool, and a device that samples at random."""

    def __init__(self, scale: int, rng: random.Random, num_blocks: int = 4000) -> None:
        """scale: times the size of one replica."""
        self._rng = rng
        self.capacity = Capacity(
            num_blocks=1 + scale * num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=8192,
            max_num_seqs=16 * scale,
            max_num_batched_tokens=256 * scale,
        )
        self.manager = BlockManager(self.capacity.groups, BLOCK_SIZE)
        self.manager.take_changes()
        self.scheduler = Scheduler(self.manager, self.capacity)
        self.num_computed = 0

    def step(self) -> list[Request]:
        """Compute one step; return the requests that sampled a token."""
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        self.scheduler.advance(plan)
        self.num_computed += sum(entry.count for entry in plan.entries)
        num_sampled = len(plan.sampled)
        tokens = self._rng.choices(range(VOCAB_SIZE), k=num_sampled)
        return [out.request for out in self.scheduler.commit(plan, StepOutput(tuple(tokens), (None,) * num_sampled))]


class Fleet:
    """`num_engines` engines, each `scale` times a replica's size, and the people that use them."""

    def __init__(
        self,
        num_engines: int,
        scale: int = 1,
        *,
        num_people: int,
        seed: int = 0,
        sampling: int = 1,
        num_blocks: int = 4000,
        choose: Choose = lambda router, hashes, num_tokens: router.choose(hashes, num_tokens)[0],
    ) -> None:
        self._choose = choose
        self._rng = random.Random(seed)
        self.router = Router(BLOCK_SIZE, sampling)
        self.engines = [SimulatedEngine(scale, self._rng, num_blocks) for _ in range(num_engines)]
        for index, engine in enumerate(self.engines):
            self.router.add(index, engine.capacity.max_num_seqs)
        prompts = [self._rng.choices(range(VOCAB_SIZE), k=self._rng.randint(50, 800)) for _ in range(4)]
        self.people = [Person(random.Random((seed << 32) + n), prompts) for n in range(num_people)]
        for person in self.people:
            person.wakes_at = self._rng.randint(0, 200)
        self._asking: dict[str, tuple[Person, Request, Route]] = {}
        self.num_steps = 0
        self.num_answers = 0
        self.num_routed: Counter[object] = Counter()
        self.num_promised_tokens = 0  # cached tokens that the router expected
        self.waits: list[int] = []  # steps from each question to the first token of its answer
        self.imbalances: list[float] = []  # of each step: sequences at the busiest replica, over the mean

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found in a prefix cache."""
        hits = sum(engine.scheduler.prefix_hits for engine in self.engines)
        return hits / sum(engine.scheduler.prefix_queries for engine in self.engines)

    @property
    def num_queried(self) -> int:
        return sum(engine.scheduler.prefix_queries for engine in self.engines)

    @property
    def imbalance(self) -> float:
        """Tokens computed by the busiest engine, over the mean."""
        counts = [engine.num_computed for engine in self.engines]
        return max(counts) * len(counts) / sum(counts)

    def run(self, num_steps: int) -> Fleet:
        for _ in range(num_steps):
            self.step()
        return self

    def step(self) -> None:
        for person in self.people:
            if person.route is None and person.wakes_at <= self.num_steps:
                self._ask(person)
        for index, engine in enumerate(self.engines):
            requests = engine.step()
            stored, removed = (short_hashes(hashes) for hashes in engine.manager.take_changes())
            self.router.stored(index, sample_hashes(stored, self.router.sampling))
            self.router.removed(index, sample_hashes(removed, self.router.sampling))
            for request in requests:
                self._take(request)
        self.num_steps += 1
        loads = [engine.scheduler.num_running + engine.scheduler.num_waiting for engine in self.engines]
        if sum(loads) >= 4 * len(loads):
            self.imbalances.append(max(loads) * len(loads) / sum(loads))

    def _ask(self, person: Person) -> None:
        prompt, max_tokens = person.ask()
        hashes = short_hashes(hash_blocks(prompt, BLOCK_SIZE))
        name = self._choose(self.router, hashes, len(prompt))
        route = person.route = self.router.started(name, hashes, len(prompt))
        self.num_routed[name] += 1
        self.num_promised_tokens += route.num_cached
        request = Request(f"r{self.num_answers + len(self._asking)}", prompt, SamplingParams(), max_tokens=max_tokens)
        self._asking[request.request_id] = (person, request, route)
        assert isinstance(name, int)
        self.engines[name].scheduler.add(request)

    def _take(self, request: Request) -> None:
        person, _, route = self._asking[request.request_id]
        if route.num_pending:
            self.waits.append(self.num_steps - person.wakes_at)
            self.router.prefilled(route)
        if request.finish_reason is not None:
            del self._asking[request.request_id]
            self.router.finished(route)
            self.num_answers += 1
            person.history = request.tokens(0, request.num_tokens)
            person.route, person.wakes_at = None, self.num_steps + person.rng.randint(1, 300)
