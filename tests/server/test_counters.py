"""Counters of several front-ends: summed under one name, and never going back when one of them dies."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tinyvllm.errors import InvariantError
from tinyvllm.server.counters import NUM_CELLS, Cells, Counters, Family, Key

TOKENS = Family("tokens", "Tokens.", "counter", ("model",))
OPEN = Family("open_streams", "Open streams.", "gauge", ("process",))
TIMES = Family("time_seconds", "Times.", "histogram", (), (0.1, 1.0))


def text_of(counters: Counters) -> list[str]:
    registry = CollectorRegistry()
    registry.register(counters)
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_values_of_all_front_ends_are_summed(tmp_path: Path) -> None:
    here, there = (Counters.shared(tmp_path, 2, own) for own in range(2))
    for counters, amount in ((here, 2), (there, 5)):
        counters.value(TOKENS, ("tiny",)).inc(amount)
        times = counters.histogram(TIMES)
        times.observe(0.1)  # a bound belongs to its bucket
        times.observe(0.5, count=amount)
        times.observe(7.0)
    here.value(OPEN, ("front-end 0",)).set(3)
    there.value(OPEN, ("front-end 1",)).set(4)
    there.register(OPEN)
    expected = [
        'tokens_total{model="tiny"} 7.0',
        'time_seconds_bucket{le="0.1"} 2.0',
        'time_seconds_bucket{le="1.0"} 9.0',
        'time_seconds_bucket{le="+Inf"} 11.0',
        "time_seconds_count 11.0",
        "time_seconds_sum 17.7",
        'open_streams{process="front-end 0"} 3.0',
        'open_streams{process="front-end 1"} 4.0',
    ]
    assert sorted(text_of(here)) == sorted(text_of(there)) == sorted(expected)
    assert here.total("tokens") == there.total("tokens") == 7


def test_a_restarted_front_end_continues_the_counters_of_the_dead_one(tmp_path: Path) -> None:
    reader, first = Counters.shared(tmp_path, 2, 0), Counters.shared(tmp_path, 2, 1)
    reader.register(TOKENS)
    first.value(TOKENS, ("tiny",)).inc(5)
    first.histogram(TIMES).observe(0.5)
    with open(tmp_path / "metrics-1.names", "ab") as file:
        file.write(b'["tokens",["lar')  # it was killed while it wrote a name
    assert reader.total("tokens") == 5
    second = Counters.shared(tmp_path, 2, 1)
    second.histogram(TIMES).observe(0.5)  # in another order
    second.value(TOKENS, ("large",)).inc(1)
    second.value(TOKENS, ("tiny",)).inc(2)
    assert sorted(text_of(reader)) == ['tokens_total{model="large"} 1.0', 'tokens_total{model="tiny"} 7.0']
    assert 'time_seconds_bucket{le="1.0"} 2.0' in text_of(second)


def test_a_front_end_that_has_not_started_counts_nothing(tmp_path: Path) -> None:
    counters = Counters.shared(tmp_path, 4, 2)
    counters.value(TOKENS, ("tiny",)).inc()
    assert text_of(counters) == ['tokens_total{model="tiny"} 1.0']


def test_cells_are_bounded() -> None:
    cells = Cells()
    cells.find(Key("a", (), NUM_CELLS))
    with pytest.raises(InvariantError, match="needs more than"):
        cells.find(Key("b", (), 1))
