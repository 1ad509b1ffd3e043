"""No program of any graph breaks one of Metal's limits, for the shapes of real models, on every family of GPUs.
The whole sweep, in a quarter of an hour, with a line for each case (docs/METAL.md has them as a table):
python -m pytest -m sweep -rP tests/metal/test_limits.py"""

from __future__ import annotations

import resource
from dataclasses import replace

import pytest

from tests.metal.limits import Case, GraphFacts, Program, graphs_of, over_limits, summary, table
from tests.metal.simulator import FAMILIES, Settings
from tinyvllm.profiling.predict import FACTORS

pytestmark = pytest.mark.timeout(900)

SHAPES = ("tinyllama-1.1b", "llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b")
OTHER_FAMILIES = ("qwen2.5-0.5b", "gemma-3-1b", "mistral-7b-v0.1")  # biases; windows, norms around products; windows
SWEEP = [
    Case(shape, family, kind, (1, 8, 64), (64, 1024))
    for shape in SHAPES
    for kind in ("float16", "Q4_K")
    for family in FAMILIES
]
# of every kind of codes: one format each
KINDS = ("mlx-4bit-g64", "mlx-3bit-g64", "mlx-8bit-g64", "awq-4bit-g128", "fp8-block128", "nvfp4", "IQ4_XS", "IQ3_S")
SWEEP += [Case("llama-3.2-1b", "Apple7", kind, (1, 8, 64), (64, 1024)) for kind in ("bfloat16", "Q4_0", "Q8_0", *KINDS)]
SWEEP += [Case(shape, "Apple7", "Q4_K", (1, 8, 64), (64, 1024)) for shape in OTHER_FAMILIES]
SPARSE = (("qwen3-30b-a3b", "bfloat16"), ("gpt-oss-20b", "mxfp4"))
SWEEP += [Case(shape, "Apple7", kind, (1, 8, 64), (64, 1024)) for shape, kind in SPARSE]
SWEEP += [Case("qwen3-0.6b", "Apple7", "bfloat16", (1, 2, 4, 8, 16, 32, 64), (64, 256, 1024))]


def check(graphs: list[GraphFacts]) -> None:
    assert over_limits(graphs) == [], table(graphs)
    for graph in graphs:
        assert graph.command_buffers == 1, f"{graph.name} is split: {graph}"
        assert len(graph.programs) >= 5 and graph.kernels >= 5 * 16, f"{graph.name} is no whole step: {graph}"


@pytest.mark.sweep  # by default: METAL among the targets of tests/ops
def test_no_program_is_over_a_limit_on_an_m1(simulator: Settings) -> None:
    """With weights of 16 GB that take no memory. The computer is then as before. Predictions count what is launched."""
    graphs = graphs_of(simulator, Case("llama-3.1-8b", "Apple7", "float16", (8,), (64,)))
    check(graphs)
    factors = FACTORS["METAL"]
    predicted = [32 * factors.layer_kernels[column] + factors.other_kernels[column] for column in (1, 2)]
    assert [graph.kernels for graph in graphs] == predicted, "correct FACTORS in tinyvllm/profiling/predict.py"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20, "KiB"
    assert not simulator.is_dry and simulator.family == "Apple9"


@pytest.mark.sweep
def test_no_program_is_over_a_limit_without_simdgroup_matrices_and_three_layers_tell_of_all(
    simulator: Settings,
) -> None:
    case = Case("smollm2-135m", "Mac2", "float16", (1,), (16,))
    graphs = graphs_of(simulator, case, is_whole=True)
    check(graphs)
    assert graphs_of(simulator, case) == graphs


@pytest.mark.sweep  # with the tests that share programs
def test_the_renderer_asks_a_family_for_its_simdgroup_matrices_alone() -> None:
    """Else `share_programs` would hide what is different."""
    from tinygrad import Device, Tensor, dtypes
    from tinygrad.codegen import do_to_program
    from tinygrad.renderer.cstyle import MetalRenderer
    from tinygrad.uop.ops import Ops

    a, b = (Tensor.empty(64, 64, dtype=dtypes.half, device="METAL") for _ in range(2))
    work = [a @ b, a.bfloat16() @ b.bfloat16(), a.exp().sum(), a.sort(1)[0]]
    kernels = [call.src[0] for tensor in work for call in tensor.schedule_linear().src]
    assert len(kernels) >= 4 and all(kernel.op is Ops.SINK for kernel in kernels)

    def sources(family: str) -> list[str]:
        target = replace(Device["METAL"].renderer.target, arch=family)
        return [do_to_program(kernel, MetalRenderer(target)).src[2].arg for kernel in kernels]

    newest, *others = (sources(family) for family in ("Apple9", "Apple8", "Apple7"))
    assert all(other == newest for other in others)
    assert "simdgroup_multiply_accumulate" in "".join(newest)
    assert "simdgroup_multiply_accumulate" not in "".join(sources("Mac2"))


@pytest.mark.sweep
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_no_program_of_the_sweep_is_over_a_limit(simulator: Settings, case: Case) -> None:
    graphs = graphs_of(simulator, case)
    print(summary(case, graphs))
    check(graphs)


def test_what_is_over_a_limit_is_named_and_counted() -> None:
    program = Program("decode 1", "wide", 2, 32, 0, 64, ("32 buffer arguments",))
    graphs = [GraphFacts("decode 1", 99, 2, 1, (program,))]
    assert over_limits(graphs) == ["decode 1: wide: 32 buffer arguments", "decode 1: 1 launches split the graph"]
