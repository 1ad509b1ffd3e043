"""The rule by which requests find their replica: against a plain definition of it, and on a simulated fleet."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.fleet import Fleet
from tests.scheduling.fakes import make_request
from tests.sweeps import examples, swept
from tinyvllm.config import BlockGroup
from tinyvllm.engine.routing import (
    SEQUENCE_TOKENS,
    USUAL_QUEUE,
    WAITING_TOKENS,
    Route,
    Router,
    sample_hashes,
    short_hashes,
)
from tinyvllm.errors import EngineDeadError, InvariantError
from tinyvllm.scheduling.block_hashes import hash_blocks
from tinyvllm.scheduling.block_manager import BlockManager

BLOCK_SIZE = 4


def make_router(num_replicas: int = 4, max_num_seqs: int = 100, block_size: int = BLOCK_SIZE) -> Router:
    router = Router(block_size)
    for name in range(num_replicas):
        router.add(name, max_num_seqs)
    return router


def prompt(text: str, num_tokens: int | None = None) -> tuple[list[int], int]:
    """`route`'s arguments for a prompt whose blocks are `text`'s letters, followed by one more token."""
    num_tokens = BLOCK_SIZE * len(text) + 1 if num_tokens is None else num_tokens
    return short_hashes(
        hash_blocks([ord(letter) for letter in text for _ in range(BLOCK_SIZE)], BLOCK_SIZE)
    ), num_tokens


class Definition:
    """The rule as its module states it, computed for each replica from the texts that it holds."""

    def __init__(self, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.texts: dict[int, set[str]] = {}  # all prefixes that a replica has stored
        self.open: dict[int, list[tuple[Route, str]]] = {}
        self.turns: dict[int, int] = {}

    def cached(self, name: int, text: str, *, with_promises: bool = True) -> int:
        known = {"", *self.texts[name]}
        for _, other in self.open[name] if with_promises else ():
            known.update(other[:end] for end in range(1, len(other) + 1))
        return max(BLOCK_SIZE * end for end in range(len(text) + 1) if text[:end] in known)

    def num_pending(self, name: int) -> int:
        return sum(route.num_pending for route, _ in self.open[name])

    def num_waiting(self, name: int) -> int:
        return max(0, len(self.open[name]) + 1 - self.max_num_seqs)

    def load(self, name: int) -> int:
        return self.num_pending(name) + SEQUENCE_TOKENS * len(self.open[name]) + WAITING_TOKENS * self.num_waiting(name)

    def choose(self, text: str) -> int:
        idlest = min(self.texts, key=self.rank)
        usual_queue = USUAL_QUEUE * self.num_waiting(idlest)
        by_length: dict[int, int] = {}
        for name in sorted(self.texts, key=self.rank, reverse=True):
            by_length[self.cached(name, text)] = name

        def cost(length: int) -> tuple[int, int]:
            name = by_length[length]
            own = min(self.num_pending(name), length - self.cached(name, text, with_promises=False))
            usual = min(self.num_waiting(name), usual_queue)
            return self.load(name) - WAITING_TOKENS * usual - own - length, -length

        return by_length[min(by_length, key=cost)]

    def rank(self, name: int) -> tuple[int, int, int]:
        return self.load(name), self.turns[name], name


class Pair:
    """A router and its definition, to which the same things happen."""

    def __init__(self, rng: random.Random, max_num_seqs: int) -> None:
        self.rng, self.router, self.rule = rng, make_router(0), Definition(max_num_seqs)
        self.num_routed = 0

    def add(self, name: int) -> None:
        self.router.add(name, self.rule.max_num_seqs)
        self.rule.texts[name], self.rule.open[name], self.rule.turns[name] = set(), [], 0

    def route(self, text: str) -> None:
        expected = self.rule.choose(text)
        num_cached = self.rule.cached(expected, text)
        assert self.router.choose(*prompt(text)) == (expected, num_cached)
        route = self.router.route(*prompt(text))
        assert (route.replica, route.num_cached) == (expected, num_cached)
        self.num_routed += 1
        self.rule.open[expected].append((route, text))
        self.rule.turns[expected] = self.num_routed

    def prefill(self, name: int) -> None:
        for route, _ in self.rule.open[name]:
            self.router.prefilled(route)

    def finish(self, name: int) -> None:
        """End some requests, after the events of their blocks."""
        while self.rule.open[name] and self.rng.random() < 0.6:
            route, text = self.rule.open[name].pop(self.rng.randrange(len(self.rule.open[name])))
            self.router.stored(name, prompt(text)[0])
            self.rule.texts[name].update(text[:end] for end in range(1, len(text) + 1))
            self.router.finished(route)

    def evict(self, name: int) -> None:
        """Drop a text and its continuations, as an idle engine does."""
        texts = sorted(self.rule.texts[name])
        if texts and not self.rule.open[name]:
            head = self.rng.choice(texts)
            gone = {text for text in texts if text.startswith(head)}
            self.router.removed(name, [prompt(text)[0][-1] for text in gone])
            self.rule.texts[name] -= gone

    def restart(self, name: int) -> None:
        assert self.router.remove(name) == [route for route, _ in self.rule.open[name]]
        self.add(name)

    def check(self) -> None:
        for name, texts in self.rule.texts.items():
            assert self.router.load(name) == self.rule.load(name)
            assert self.router.num_blocks(name) == len(texts)


@examples(20, 60)
@given(st.randoms(use_true_random=False), st.sampled_from([2, 100]))
def test_the_choice_is_the_cheapest_replica(rng: random.Random, max_num_seqs: int) -> None:
    pair = Pair(rng, max_num_seqs)
    for name in range(3):
        pair.add(name)
    for _ in range(60):
        pair.route("".join(rng.choices("ab", k=rng.randint(0, 6))))
        for act, chance in ((pair.prefill, 0.3), (pair.finish, 0.8), (pair.evict, 0.2), (pair.restart, 0.05)):
            if rng.random() < chance:
                act(rng.choice(pair.router.replicas))  # type: ignore[arg-type]
        pair.check()


@examples(20, 60)
@given(st.randoms(use_true_random=False))
def test_nothing_is_left_of_what_has_ended(rng: random.Random) -> None:
    """Requests that end early, events that repeat or come late, replicas that die: in any order."""
    router = make_router(3)
    routes: list[Route] = []
    for _ in range(60):
        hashes, num_tokens = prompt("".join(rng.choices("ab", k=rng.randint(0, 6))))
        act = rng.choice(["route", "route", "stored", "removed", "finished", "died"])
        name = rng.choice(router.replicas)
        if act == "route":
            routes.append(router.route(hashes, num_tokens))
        elif act == "stored":
            router.stored(name, hashes)
        elif act == "removed":
            router.removed(name, hashes)
        elif act == "finished" and routes:
            router.finished(rng.choice(routes))
        elif act == "died":
            open_routes = router.remove(name)
            assert all(route.replica == name and not route.is_open for route in open_routes)
            router.add(name, 100)
            assert router.load(name) == router.num_blocks(name) == 0
    for route in routes:
        router.finished(route)
    assert not router._promises
    assert [router.load(name) for name in router.replicas] == [0, 0, 0]
    for name in router.replicas:
        router.remove(name)
    assert not router._holders and not router._order


def test_equal_replicas_take_turns() -> None:
    router = make_router(4)
    assert [router.route(*prompt(letter)).replica for letter in "abcdefgh"] == [0, 1, 2, 3] * 2


def test_a_conversation_stays_with_the_replica_that_holds_it() -> None:
    router = make_router(4)
    router.stored(2, prompt("abcdef")[0])
    assert router.route(*prompt("abcdefgh")).replica == 2
    assert router.choose(*prompt("xbcdefgh"))[1] == 0  # the same blocks after another one are others


def test_a_busy_replica_keeps_a_request_only_as_long_as_computing_it_anew_takes_longer() -> None:
    router = make_router(2)
    router.stored(0, prompt("a" * 20)[0])
    router.reported(0, 0, 79)  # of its 80 cached tokens the prompt has 80
    assert router.choose(*prompt("a" * 20)) == (0, 80)
    router.reported(0, 0, 81)
    assert router.choose(*prompt("a" * 20)) == (1, 0)


def test_the_last_token_is_computed_in_any_case() -> None:
    router = make_router(1)
    router.stored(0, prompt("ab")[0])
    assert router.choose(*prompt("ab", num_tokens=8)) == (0, 4)
    assert router.choose(*prompt("ab", num_tokens=9)) == (0, 8)


def test_a_burst_of_one_conversation_stays_together_before_any_event() -> None:
    router = make_router(4)
    routes = [router.route(*prompt("system prompt of a service" + letter)) for letter in "abcd"]
    assert {route.replica for route in routes} == {0}
    assert [route.num_cached for route in routes] == [0, 104, 104, 104]
    router.finished(routes[0])  # refused, say: its events never come
    assert router.choose(*prompt("system prompt of a service"))[1] == 0


def test_a_prefix_that_everyone_uses_spreads_and_swamps_nobody() -> None:
    router = make_router(8, max_num_seqs=16)
    longest = 0
    for _ in range(100):
        route = router.route(*prompt("p" * 250))  # 1,000 tokens
        router.prefilled(route)
        loads = [router.load(name) for name in router.replicas]
        longest = max(longest, max(loads) - min(loads))
    assert longest <= 1000 + SEQUENCE_TOKENS + WAITING_TOKENS
    assert max(router.num_sequences(name) for name in router.replicas) <= 16 + 1000 // WAITING_TOKENS


def test_the_routes_of_a_dead_replica_can_be_run_elsewhere() -> None:
    router = make_router(2)
    router.stored(0, prompt("abc")[0])
    route = router.route(*prompt("abcd"))
    assert route.replica == 0
    assert router.remove(0) == [route]
    router.finished(route)
    assert router.route(*prompt("abcd")).replica == 1
    router.add(0, 100)
    assert router.num_blocks(0) == 0
    assert router.choose(*prompt("abcd" + "x" * 50)) == (0, 0)  # its earlier blocks are forgotten
    for name in (0, 1):
        router.remove(name)
    with pytest.raises(EngineDeadError, match="no replica is left"):
        router.choose(*prompt("abcd"))


def test_a_replica_is_added_once() -> None:
    with pytest.raises(InvariantError, match="added twice"):
        make_router(2).add(1, 100)


def test_requests_of_other_front_ends_count_by_the_replicas_own_account() -> None:
    router = make_router(2)
    router.reported(0, 5, 0)
    assert [router.route(*prompt(letter)).replica for letter in "ab"] == [1, 1]
    router.reported(0, 0, 0)
    assert router.route(*prompt("c")).replica == 0


def test_hashes_are_those_of_the_pool() -> None:
    manager = BlockManager([BlockGroup(20)], block_size=BLOCK_SIZE)
    request = make_request(prompt=30)
    assert manager.take_changes() == ([], [])
    assert manager.grow(request, 30)
    request.num_computed = 30
    manager.seal(request)
    stored, removed = manager.take_changes()
    assert stored == hash_blocks(request.prompt_ids, BLOCK_SIZE) and len(stored) == 7 and not removed
    assert [number.to_bytes(8, "little") for number in short_hashes(stored)] == [name[:8] for name in stored]


def test_a_router_that_samples_keeps_one_hash_in_many() -> None:
    rng = random.Random(0)
    hashes = [rng.getrandbits(64) for _ in range(800)]
    router = Router(16, sampling=8)
    router.add("a", 100)
    router.stored("a", hashes)
    assert router.num_blocks("a") == len(sample_hashes(hashes, 8)) == pytest.approx(100, abs=30)
    _, num_cached = router.choose([*hashes, 5], 16 * 801 + 1)
    assert 16 * 700 < num_cached <= 16 * 800
    router.removed("a", hashes)
    assert router.num_blocks("a") == 0


# The fleet: real schedulers and pools.


def take_turns(router: Router, hashes: Sequence[int], num_tokens: int) -> object:
    counts = Counter({name: router.num_sequences(name) for name in router.replicas})
    return min(router.replicas, key=lambda name: (counts[name], random.Random(num_tokens).random()))


@pytest.mark.parametrize("num_replicas", swept((2, 4, 8), [2]))
def test_conversations_hit_the_cache_as_in_one_engine_and_load_stays_even(num_replicas: int) -> None:
    num_people = 30 * num_replicas
    whole = Fleet(1, num_replicas, num_people=num_people).run(1500)
    fleet = Fleet(num_replicas, num_people=num_people).run(1500)
    idlest = Fleet(num_replicas, num_people=num_people, choose=take_turns).run(1500)
    print(
        f"{num_replicas} replicas: {fleet.hit_rate:.4f}; one engine: {whole.hit_rate:.4f}; idlest {idlest.hit_rate:.4f}"
    )
    print(
        f"tokens at the busiest, over the mean: {fleet.imbalance:.3f}; answers {fleet.num_answers}, {whole.num_answers}"
    )
    assert fleet.hit_rate > whole.hit_rate - 0.01
    assert fleet.hit_rate > idlest.hit_rate + 0.05
    assert fleet.imbalance < 1.25
    assert fleet.num_answers > 0.99 * whole.num_answers
    assert fleet.num_promised_tokens == pytest.approx(fleet.hit_rate * fleet.num_queried, rel=0.01)
