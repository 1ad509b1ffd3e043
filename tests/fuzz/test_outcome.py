"""The fuzzers' own parts: each way to end is recognized, and mutations are determined by their seed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutate import dump_json, mutate_bytes, mutate_json
from tests.fuzz.outcome import Runner
from tinyvllm.errors import ModelError

TREE = {"a": [1, 2.5, "three"], "b": {"c": None, "d": True}}


class Panic(BaseException):
    """As the bindings of Rust libraries have one."""


def load(path: Path) -> Any:
    """Ends in the way that the file's name says."""
    match path.name:
        case "refused":
            raise ModelError("the file lies")
        case "uncaught":
            return TREE["missing"]
        case "panic":
            raise Panic("an index is out of bounds")
        case "slow":
            while time.process_time() < 1e9:
                pass
        case "died":
            os.abort()
        case "memory":
            return bytes(1 << 40)
    return None


def test_every_way_to_end_is_recognized(tmp_path: Path) -> None:
    names = ("ok", "refused", "uncaught", "panic", "died", "memory", "slow", "ok again")
    with Runner(load, cpu_s=0.2) as runner:
        outcomes = {name: runner.run(tmp_path / name) for name in names}
    assert {name: outcome.kind for name, outcome in outcomes.items()} == {
        **{name: name for name in names[:-1]},
        "panic": "uncaught",
        "ok again": "ok",
    }
    assert "KeyError: 'missing'" in outcomes["uncaught"].detail
    assert "in load" in outcomes["slow"].detail  # where it was


def test_a_seed_names_a_mutation() -> None:
    def mutated(seed: int) -> tuple[bytes, bytes]:
        rng = Random(seed)
        return dump_json(mutate_json(rng, TREE, 2)), mutate_bytes(rng, bytes(100))

    cases = [mutated(seed) for seed in range(60)]
    assert cases == [mutated(seed) for seed in range(60)]
    assert len({text for text, _ in cases}) > 40
    assert TREE == {"a": [1, 2.5, "three"], "b": {"c": None, "d": True}}
