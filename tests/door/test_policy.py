"""Which model is loaded, which one ends for it, and that no request is forgotten: rules without processes or clocks."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.sweeps import examples
from tinyvllm.door.policy import (
    PATIENCE_S,
    Action,
    Admit,
    Load,
    Measure,
    Need,
    Policy,
    Refuse,
    Rule,
    Start,
    State,
    Ticket,
    Unload,
)

GIB = 2**30
MEMORY = 100 * GIB


class Machine:
    """A device with MEMORY bytes, and processes that do what they are told at once, or when the test says so."""

    def __init__(self, *rules: Rule, max_loaded: int = 2, sizes: dict[str, int] | None = None) -> None:
        self.policy = Policy(rules, max_loaded)
        self.max_loaded = max_loaded
        self.sizes = sizes or {}
        self.now_s = 0.0
        self.log: list[str] = []
        self.admitted: set[Ticket] = set()
        self.refused: dict[Ticket, str] = {}
        self.pending: list[Action] = []  # orders that processes have not carried out yet

    def need(self, model: str) -> Need:
        held = sum(entry.held for entry in self.policy.entries.values())
        weights = self.sizes.get(model, GIB)
        return Need(device="GPU", weights=weights, scratch=0, kv=0, context=4096, free=MEMORY - held, share=1.0)

    def step(self) -> None:
        """Take what the policy decides. Checks what must always hold."""
        for action in self.policy.actions(self.now_s):
            self._check(action)
            match action:
                case Admit():
                    self.admitted.update(action.tickets)
                case Refuse():
                    self.refused |= dict.fromkeys(action.tickets, action.reason)
                case _:
                    self.pending.append(action)
                    self.log.append(f"{type(action).__name__.lower()} {action.model}")
        entries = self.policy.entries.values()
        assert sum(entry.is_resident for entry in entries) <= self.max_loaded
        assert sum(entry.held for entry in entries) <= MEMORY
        assert sum(entry.state in (State.STARTING, State.EXAMINED, State.LOADING) for entry in entries) <= 1

    def _check(self, action: Action) -> None:
        if not isinstance(action, Unload):
            return
        entry = self.policy.entries[action.model]
        assert not entry.running, "a busy model was ended"
        if action.is_eviction:
            assert not entry.rule.is_pinned
            idle = [e for e in self.policy.entries.values() if e.is_idle and not e.rule.is_pinned]
            assert all(entry.used_s <= other.used_s for other in idle), "not the least recently used"

    def carry_out(self, *, fails: bool = False) -> None:
        """The oldest order is carried out."""
        action = self.pending.pop(0)
        match action:
            case Start() | Measure():
                self.policy.examined(action.model, self.need(action.model))
            case Load() if fails:
                self.refused |= dict.fromkeys(self.policy.ended(action.model, self.now_s, "broken"), "broken")
            case Load():
                self.policy.loaded(action.model, self.now_s)
            case Unload():
                assert not self.policy.ended(action.model, self.now_s)
        self.step()

    def settle(self) -> None:
        self.step()
        while self.pending:
            self.carry_out()

    def enter(self, model: str, **options: Any) -> Ticket:
        ticket = self.policy.enter(model, self.now_s, **options)
        self.step()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        self.policy.leave(ticket, self.now_s)
        self.step()

    def use(self, model: str, **options: Any) -> None:
        """One request, from its beginning to its end."""
        ticket = self.enter(model, **options)
        self.settle()
        assert ticket in self.admitted, f"{model} was not loaded: {self.log}"
        self.leave(ticket)
        self.settle()

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.settle()

    def states(self) -> dict[str, str]:
        return {name: entry.state.value for name, entry in self.policy.entries.items() if entry.is_resident}


def rules(names: str, keep_alive_s: float = math.inf, **options: Any) -> list[Rule]:
    return [Rule(name, keep_alive_s, **options) for name in names]


def test_the_least_recently_used_idle_model_makes_room() -> None:
    machine = Machine(*rules("ABC"))
    for model in "ABA":
        machine.use(model)
        machine.now_s += 1
    machine.use("C")
    assert machine.states() == {"A": "ready", "C": "ready"}
    assert machine.log == ["start A", "load A", "start B", "load B", "unload B", "start C", "load C"]


def test_a_model_ends_when_it_is_idle_for_its_own_time() -> None:
    machine = Machine(Rule("A", 300.0), Rule("B", 10.0), Rule("P", 0.0, is_pinned=True), max_loaded=3)
    machine.settle()
    for model in "ABP":
        machine.use(model)
    assert machine.policy.wake_up_s(machine.now_s) == 10.0
    machine.pass_time(10.0)
    assert machine.states() == {"A": "ready", "P": "ready"}
    machine.pass_time(290.0)
    assert machine.states() == {"P": "ready"} and machine.policy.wake_up_s(machine.now_s) == math.inf


def test_a_request_says_how_long_its_model_stays() -> None:
    machine = Machine(Rule("A", 300.0))
    machine.use("A", keep_alive_s=0.0)
    assert not machine.states()
    machine.use("A", keep_alive_s=math.inf)
    machine.pass_time(1e9)
    assert machine.states() == {"A": "ready"}
    machine.use("A")  # back to the model's own
    machine.pass_time(300.0)
    assert not machine.states()
    earlier = machine.enter("A")
    machine.settle()
    machine.now_s += 1
    machine.use("A", keep_alive_s=0.0)
    assert machine.states() == {"A": "ready"}  # busy
    machine.leave(earlier)
    machine.settle()
    assert not machine.states()


def test_models_are_loaded_one_at_a_time_in_the_order_of_their_first_requests() -> None:
    machine = Machine(*rules("ABC"), max_loaded=3)
    tickets = []
    for model in "BACBA":
        tickets.append(machine.enter(model))
        machine.now_s += 0.1
    machine.settle()
    assert [line for line in machine.log if line.startswith("load")] == ["load B", "load A", "load C"]
    assert machine.admitted == set(tickets)


def test_pinned_models_are_loaded_first_and_again_after_their_death() -> None:
    machine = Machine(Rule("A", 0.0), Rule("P", 0.0, is_pinned=True))
    machine.settle()
    assert machine.states() == {"P": "ready"}
    machine.policy.lost("P")
    machine.policy.ended("P", machine.now_s)
    machine.settle()
    assert machine.states() == {"P": "ready"}


def test_memory_is_shared_in_equal_parts_and_large_models_get_what_they_need() -> None:
    machine = Machine(*rules("ABL"), sizes={"L": 70 * GIB})
    machine.use("A")
    machine.use("B")
    held = {name: entry.held // GIB for name, entry in machine.policy.entries.items()}
    assert held == {"A": 50, "B": 50, "L": 0}
    machine.use("L")  # both must go
    assert machine.states() == {"L": "ready"} and machine.policy.entries["L"].held == 70 * GIB
    own = Machine(Rule("A", 1.0, memory_share=0.2), Rule("B", 1.0))
    own.use("A")
    own.use("B")
    assert [own.policy.entries[name].held // GIB for name in "AB"] == [20, 50]


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    machine = Machine(Rule("P", 1.0, is_pinned=True), Rule("L", 1.0), sizes={"P": 40 * GIB, "L": 70 * GIB})
    machine.settle()
    ticket = machine.enter("L")
    machine.settle()
    reason = machine.refused[ticket]
    assert "'L' needs 70.00 GiB" in reason and "50.00 GiB are free" in reason and "'P' (50.00 GiB, pinned)" in reason
    assert machine.states() == {"P": "ready"}
    assert machine.policy.error_of("L", machine.now_s) == reason  # no process is started for the next one
    assert not machine.policy.error_of("L", machine.now_s + 60)


def test_a_busy_model_makes_room_once_it_is_idle_and_in_the_end_takes_no_more_requests() -> None:
    machine = Machine(*rules("AB"), max_loaded=1)
    first = machine.enter("A")
    machine.settle()
    other = machine.enter("B")
    assert machine.policy.wake_up_s(0.0) == PATIENCE_S
    second = machine.enter("A")
    assert second in machine.admitted  # for a while, A goes on
    machine.pass_time(PATIENCE_S)
    third = machine.enter("A")
    assert third not in machine.admitted
    machine.leave(first)
    machine.settle()
    assert other not in machine.admitted
    machine.leave(second)
    machine.settle()
    assert other in machine.admitted and third not in machine.admitted
    machine.leave(other)
    machine.settle()
    assert third in machine.admitted


def test_if_the_one_that_waits_leaves_the_busy_model_goes_on() -> None:
    machine = Machine(*rules("AB"), max_loaded=1)
    machine.enter("A")
    machine.settle()
    other = machine.enter("B")
    machine.pass_time(PATIENCE_S)
    late = machine.enter("A")
    assert late not in machine.admitted
    machine.leave(other)
    assert late in machine.admitted


def test_a_failed_load_is_told_to_all_who_wait_and_tried_again_later() -> None:
    machine = Machine(*rules("A"))
    tickets = {machine.enter("A"), machine.enter("A")}
    machine.carry_out()
    machine.carry_out(fails=True)
    assert set(machine.refused) == tickets and not machine.states()
    assert machine.policy.error_of("A", 0.5) == "broken" and not machine.policy.error_of("A", 1.0)
    machine.now_s = 1.0
    machine.use("A")
    assert machine.states() == {"A": "ready"}


def test_requests_that_wait_for_a_model_that_dies_before_they_run_stay() -> None:
    machine = Machine(*rules("AB"), max_loaded=1)
    running = machine.enter("A")
    machine.settle()
    machine.policy.lost("A")
    waiting = machine.enter("A")
    assert waiting not in machine.admitted
    machine.policy.ended("A", machine.now_s)
    machine.settle()
    assert waiting in machine.admitted
    machine.leave(running)  # of the process that died: the new one is still busy
    assert machine.policy.entries["A"].running == {waiting}


OPERATIONS = st.one_of(
    st.tuples(st.just("enter"), st.sampled_from("ABCP"), st.sampled_from([None, 0.0, 5.0, math.inf])),
    st.tuples(st.just("leave"), st.integers(0, 30)),
    st.tuples(st.just("carry out"), st.booleans()),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.5, 3.0, 20.0])),
    st.tuples(st.just("die"), st.sampled_from("ABCP")),
)


@examples(50, 150)
@given(st.lists(OPERATIONS, max_size=40), st.integers(2, 3), st.sampled_from([1, 30, 60]))
def test_no_request_is_forgotten_whatever_happens(
    operations: list[tuple[Any, ...]], max_loaded: int, large: int
) -> None:
    machine = Machine(
        *rules("ABC", 8.0),
        Rule("P", 8.0, is_pinned=True),
        max_loaded=max_loaded,
        sizes={"C": large * GIB, "B": 20 * GIB},
    )
    open_tickets: list[Ticket] = []
    machine.step()
    for operation in operations:
        match operation:
            case ("enter", model, keep_alive_s):
                if not machine.policy.error_of(model, machine.now_s):
                    open_tickets.append(machine.enter(model, keep_alive_s=keep_alive_s))
            case ("leave", index) if index < len(open_tickets):
                machine.leave(open_tickets.pop(index))
            case ("carry out", fails) if machine.pending:
                machine.carry_out(fails=fails)
            case ("wait", seconds):
                machine.now_s += seconds
                machine.step()
            case ("die", model) if machine.policy.entries[model].state is State.READY:
                machine.policy.lost(model)
                machine.policy.ended(model, machine.now_s)
                machine.step()
    left = set(open_tickets)
    for _ in range(100):  # everything that waits gets its turn, when those that run end
        machine.settle()
        for ticket in [ticket for ticket in left if ticket in machine.admitted or ticket in machine.refused]:
            left.discard(ticket)
            machine.leave(ticket)
        machine.now_s += 1.0
    assert not left, f"{[ticket.model for ticket in left]} still wait: {machine.states()}"
