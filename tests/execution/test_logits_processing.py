"""What is sent to the device for logits processing: what stays is sent once, and a mask only when it changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.execution.driver import make_request
from tinyvllm.errors import InvariantError
from tinyvllm.execution import logits_processing
from tinyvllm.execution.logits_processing import SamplingRows
from tinyvllm.ops.sampling.reference import allowed_ids
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request, Status

VOCAB = 100
LAYOUT = StepLayout(4, 4, 8, 8)


class State:
    """Notes what a SamplingState would be told to write."""

    def __init__(self, num_rows: int = 4) -> None:
        self.num_rows, self.vocab_size = num_rows, VOCAB
        self.written: Counter[str] = Counter()
        self.counts: dict[int, tuple[list[int], list[int]]] = {}
        self.masks: dict[int, np.ndarray] = {}
        self.biases: dict[int, dict[int, float]] = {}

    def write_counts(self, row: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        self.written["counts"] += 1
        self.counts[row] = (list(prompt_ids), list(output_ids))

    def write_mask(self, row: int, words: np.ndarray) -> None:
        self.written["mask"] += 1
        self.masks[row] = allowed_ids(words, VOCAB)

    def write_bias(self, row: int, bias: Mapping[int, float]) -> None:
        self.written["bias"] += 1
        self.biases[row] = dict(bias)


class Bench:
    def __init__(self, num_rows: int = 4) -> None:
        self.state = State(num_rows)
        self.rows = SamplingRows(self.state)  # type: ignore[arg-type]
        self.views = LAYOUT.views(np.zeros(LAYOUT.size, np.int32))

    def step(self, *requests: Request, token: int = 7) -> list[int]:
        """Sample one token for each; returns the state rows that the step reads."""
        entries = tuple(Scheduled(request, request.num_computed, request.num_pending) for request in requests)
        self.rows.pack(StepPlan(entries), self.views)
        for request in requests:
            request.num_computed = request.num_tokens
            request.output_ids.append(token)
        return self.views["state_rows"][: len(requests)].tolist()


def running(name: str, **params: Any) -> Request:
    request = make_request([1, 2, 3], name=name, **params)
    request.status = Status.RUNNING
    return request


def test_what_stays_is_written_once_in_a_requests_life() -> None:
    bench = Bench()
    request = running(
        "a", presence_penalty=0.5, repetition_penalty=1.5, logit_bias={5: 2.0, 9: -1.0}, allowed_token_ids=(5, 7, 9)
    )
    rows = [bench.step(request) for _ in range(5)]
    assert len({row for (row,) in rows}) == 1
    assert bench.state.written == {"counts": 1, "mask": 1, "bias": 1}
    ((row,), *_) = rows
    assert bench.state.counts[row] == ([1, 2, 3], []), "the device counts what it samples"
    assert np.flatnonzero(bench.state.masks[row]).tolist() == [5, 7, 9]
    assert bench.state.biases[row] == {5: 2.0, 9: -1.0}
    views = bench.views
    assert (views["is_counted"][0], views["is_masked"][0], views["num_bias"][0]) == (1, 1, 2)
    assert views["repetition_penalty"].view(np.float32)[0] == 1.5
    assert views["presence_penalty"].view(np.float32)[0] == 0.5


def test_rows_beside_it_have_no_state_and_cost_nothing() -> None:
    bench = Bench()
    assert bench.step(running("a"), running("b", typical_p=0.5, temperature=1.0), running("c"))[::2] == [-1, -1]
    assert bench.state.written == {}, "typical_p is a number of the step's inputs"
    assert (bench.views["state_rows"][3:] == -1).all()


def test_a_preempted_request_is_rewritten_with_its_output() -> None:
    bench = Bench()
    request, other = running("a", frequency_penalty=1.0), running("b", frequency_penalty=1.0)
    for _ in range(3):
        bench.step(request, other)
    request.num_computed, request.status = 0, Status.WAITING
    bench.step(other)
    request.status = Status.RUNNING
    row = bench.step(other, request)[1]
    assert bench.state.counts[row] == ([1, 2, 3], [7, 7, 7])
    assert bench.state.written["counts"] == 3


def test_rows_of_those_that_ended_are_given_to_others() -> None:
    bench = Bench(num_rows=2)
    for round_number in range(5):
        pair = [running(f"{round_number}{name}", presence_penalty=1.0) for name in "ab"]
        assert sorted(bench.step(*pair)) == [0, 1]
        for request in pair:
            request.status = Status.FINISHED
    with pytest.raises(InvariantError, match="all 2 rows of the sampling state are taken"):
        bench.step(*[running(name, presence_penalty=1.0) for name in "abc"])


def test_a_bad_word_is_banned_where_its_beginning_is_the_outputs_end() -> None:
    """A word of one token always; one of several only when its last would complete it."""
    bench = Bench()
    request = running("a")
    request.bad_words_ids = ((4,), (7, 8), (7, 7, 9))
    banned = []
    for _ in range(3):
        (row,) = bench.step(request)
        banned.append(np.flatnonzero(~bench.state.masks[row]).tolist())
    assert banned == [[4], [4, 8], [4, 8, 9]]


def test_a_grammars_mask_is_cut_by_what_else_is_allowed() -> None:
    class Odd:
        is_finished, error = False, None

        def fill_mask(self, out: np.ndarray, after: Sequence[int] = ()) -> None:
            out.view(np.uint32)[:] = 0xAAAAAAAA

        def count_allowed(self, drafts: Sequence[int]) -> int:
            return 0

        def accept(self, token_id: int) -> bool:
            return True

    bench = Bench()
    request = running("a", allowed_token_ids=tuple(range(10)))
    request.constraint, request.bad_words_ids = Odd(), ((3,),)
    for _ in range(4):
        (row,) = bench.step(request)
    assert np.flatnonzero(bench.state.masks[row]).tolist() == [1, 5, 7, 9]
    assert bench.state.written == {"mask": 4}


def test_the_allowed_ids_become_bits_once_while_a_mask_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bad words' bits are rebuilt, since they depend on the output; those of always allowed ids are not."""
    made: list[tuple[int, ...]] = []
    original = logits_processing._bits

    def note(ids: Sequence[int], num_words: int) -> np.ndarray:
        made.append(tuple(ids))
        return original(list(ids), num_words)

    monkeypatch.setattr(logits_processing, "_bits", note)
    bench = Bench()
    request = running("a", allowed_token_ids=(5, 7, 9))
    request.bad_words_ids = ((7, 9),)
    for _ in range(3):
        (row,) = bench.step(request)
        assert set(np.flatnonzero(bench.state.masks[row])) <= {5, 7, 9}
    assert made.count((5, 7, 9)) == 1
    assert bench.state.written["mask"] == 3
