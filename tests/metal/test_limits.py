"""No program of any graph breaks one of Metal's limits, for the shapes of real models, on every family of GPUs.
The whole sweep, in about half an hour: python -m pytest -m slow tests/metal/test_limits.py"""

from __future__ import annotations

import resource

import pytest

from tests.metal.limits import GraphFacts, Program, find_shape, graphs_of, over_limits, table
from tests.metal.simulator import Settings

pytestmark = pytest.mark.timeout(900)

SHAPES = ("smollm2-135m", "tinyllama-1.1b", "llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b-like")
KINDS = {"Apple7": ("float16", "bfloat16", "Q4_K", "Q8_0"), "Apple8": ("Q4_K",), "Apple9": ("float16", "Q4_0")}
KINDS["Mac2"] = ("float16", "Q4_K")
SWEEP = [(shape, family, kind) for shape in SHAPES for family, kinds in KINDS.items() for kind in kinds]


def check(graphs: list[GraphFacts]) -> None:
    assert over_limits(graphs) == [], table(graphs)
    for graph in graphs:
        assert graph.command_buffers == 1, f"{graph.name} is split: {graph}"
        assert len(graph.programs) >= 5 and graph.kernels >= 5 * 16, f"{graph.name} is no whole step: {graph}"


@pytest.mark.parametrize(
    ("shape", "family", "decode", "prefill"), [("llama-3.1-8b", "Apple7", 8, 64), ("smollm2-135m", "Mac2", 1, 16)]
)
def test_no_program_is_over_a_limit(simulator: Settings, shape: str, family: str, decode: int, prefill: int) -> None:
    """With weights that take no memory: 16 GB of them in one case. The computer is then as before."""
    check(graphs_of(simulator, find_shape(shape), family, "float16", [decode], [prefill]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20, "KiB"
    assert not simulator.is_dry and simulator.family == "Apple9"


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "family", "kind"), SWEEP, ids=["-".join(case) for case in SWEEP])
def test_no_program_of_the_sweep_is_over_a_limit(simulator: Settings, shape: str, family: str, kind: str) -> None:
    check(graphs_of(simulator, find_shape(shape), family, kind, [1, 2, 8, 64], [64, 1024]))


def test_what_is_over_a_limit_is_named_and_counted() -> None:
    program = Program("decode 1", "wide", 2, 32, 0, 64, ("32 buffer arguments",))
    graphs = [GraphFacts("decode 1", 99, 2, 1, (program,))]
    assert over_limits(graphs) == ["decode 1: wide: 32 buffer arguments", "decode 1: 1 launches split the graph"]
    assert "32 buffer arguments" in table(graphs)
