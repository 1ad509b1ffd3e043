"""Every program of every graph of a model's shape on METAL, next to Metal's limits:
python -m tests.metal.limits --shape llama-3.2-1b --family Apple7 --kind Q4_K

The engine itself is started, on a simulated computer where nothing runs and buffers have no memory: the weights are
shapes alone. Three layers stand for all, unless it is told otherwise. Ends with status 1 where a program is over a
limit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from tests.metal.simulator import FAMILIES, Settings, set_family, where_nothing_runs
from tests.metal.simulator.metal_objects import MAX_OFFSET
from tests.metal.simulator.msl import (
    MAX_BUFFERS,
    MAX_THREADGROUP_BYTES,
    MAX_THREADS,
    SIMDGROUP,
    MslError,
    read_kernel,
    refusals,
)
from tinyvllm.arrays import HostMatrix
from tinyvllm.config import CACHE_DIR_VARIABLE, EngineConfig, ModelConfig

if TYPE_CHECKING:
    from tinyvllm.ops.backend import Backend
    from tinyvllm.ops.formats.matrix import Matrix

MAX_MODEL_LEN = 2048
DECODE, PREFILL = (1, 2, 4, 8, 16, 32, 64), (64, 256, 1024)
LAYERS = 3  # that stand for all: the first, one in the middle, the last
ROWS = 32  # of the stand-in for a matrix: its planes are as much larger as the matrix has more rows
MEMORY_BYTES = 1 << 40


@dataclass(frozen=True)
class Program:
    """One program of a graph. `over`: the limits that it breaks, in words."""

    graph: str
    name: str
    launches: int
    arguments: int
    threadgroup_bytes: int
    threads: int
    over: tuple[str, ...]


@dataclass(frozen=True)
class GraphFacts:
    """What one step of a bucket launches. `command_buffers`: the graphs that it is split into, and single launches."""

    name: str
    kernels: int
    command_buffers: int
    others: int  # launches that are no kernel, and so split the graph
    programs: tuple[Program, ...]

    def with_more_layers(self, count: int, less: GraphFacts) -> GraphFacts:
        """The same with `count` more layers. `less`: of one layer less than this."""

        def stretched(program: Program, other: Program) -> Program:
            assert replace(other, launches=program.launches) == program, f"{program} became {other}"
            return replace(program, launches=program.launches + count * (program.launches - other.launches))

        programs = tuple(stretched(*pair) for pair in zip(self.programs, less.programs, strict=True))
        return replace(self, kernels=self.kernels + count * (self.kernels - less.kernels), programs=programs)


@dataclass(frozen=True)
class Case:
    """A shape on a family's computer, its matrices of `kind`, with these buckets."""

    shape: str
    family: str
    kind: str
    decode: tuple[int, ...]
    prefill: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.shape}-{self.family}-{self.kind}"


def graphs_of(settings: Settings, case: Case, *, is_whole: bool = False) -> list[GraphFacts]:
    """The graphs of a case's buckets. Unless `is_whole`, of LAYERS layers, which have the programs of all; what a step
    launches is then counted from it and from a step of one layer less."""
    from tinyvllm.bench.shapes import find_shape

    model = find_shape(case.shape)
    with _nothing_runs(settings, case.family):
        if is_whole:
            return _record(settings, model, case)
        period = len(model.recurrent)  # layers of a hybrid differ, and are repeated as a pattern
        counts = (2 * period, period) if period else (LAYERS, LAYERS - 1)
        graphs, less = (_record(settings, replace(model, num_layers=count), case) for count in counts)
    missing = (model.num_layers - counts[0]) // (counts[0] - counts[1])
    return [graph.with_more_layers(missing, other) for graph, other in zip(graphs, less, strict=True)]


def _record(settings: Settings, model: ModelConfig, case: Case) -> list[GraphFacts]:
    from tinyvllm.execution.runner import make_runner

    config = EngineConfig(
        model.name,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max(case.decode),
        max_num_batched_tokens=max(case.prefill),
        num_gpu_blocks_override=MAX_MODEL_LEN // 16 * max(case.decode) + 1,
        decode_buckets=case.decode,
        token_buckets=case.prefill,
        compile_cache=False,
    )
    dtype = case.kind if case.kind in ("float32", "float16", "bfloat16") else "float16"
    runner = make_runner(replace(model, dtype=dtype), ShapeWeights(case.kind), config)
    runner.warm_up()
    graphs = [_facts(settings, runner.captures.graphs[bucket]) for bucket in runner.buckets]
    runner.close()
    return graphs


@contextmanager
def _nothing_runs(settings: Settings, family: str) -> Iterator[None]:
    from tinyvllm.device.handle import DeviceHandle
    from tinyvllm.execution import runner
    from tinyvllm.model import delta_net
    from tinyvllm.ops import backends

    old = settings.family, settings.memory_bytes

    def make_backend(*args: Any, **kwargs: Any) -> Backend:
        return without_weights(backends.make_backend(*args, **kwargs))

    settings.memory_bytes = MEMORY_BYTES
    set_family(settings, family)
    share_programs()
    try:
        with (
            where_nothing_runs(settings),
            mock.patch.object(runner, "make_backend", make_backend),
            mock.patch.object(DeviceHandle, "free_memory", lambda self: MEMORY_BYTES),
            mock.patch.object(delta_net, "_b_over_a", _b_over_a),
        ):
            yield
    finally:
        settings.memory_bytes = old[1]
        set_family(settings, old[0])


def share_programs() -> None:
    """Let the open device have what was compiled for other families whose renderer writes the same: tinygrad's asks a
    family for its simdgroup matrices and nothing else, which test_limits.py holds it to."""
    from tinygrad import Device
    from tinygrad.codegen import to_program_cache

    renderer = Device["METAL"].renderer
    for (kernel, kind, target, *settings), program in list(to_program_cache.items()):
        if kind is type(renderer) and kind(target).tensor_cores == renderer.tensor_cores:
            to_program_cache.setdefault((kernel, kind, renderer.target, *settings), program)


# -- weights that are shapes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """Stands for a matrix of a checkpoint."""

    kind: str
    shape: tuple[int, int]

    def __getitem__(self, rows: np.ndarray) -> _Shape:
        return _Shape(self.kind, (len(rows), self.shape[1]))


class ShapeWeights:
    """A checkpoint of shapes; vectors and convolutions are ones. In a mixture called Q4_K, V and down are Q6_K, as in
    llama.cpp's."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def take(self, name: str, shape: tuple[int, ...]) -> Any:
        if len(shape) == 1 or "conv1d" in name:
            return np.ones(shape, np.float32)
        is_finer = self._kind == "Q4_K" and any(part in name for part in ("v_proj", "down_proj", "embed", "lm_head"))
        return _Shape("Q6_K" if is_finer else self._kind, (shape[0], shape[1]))

    def finish(self) -> None:
        """Nothing is left over."""


def without_weights(backend: Backend) -> Backend:
    """The backend, loading shapes: it is given matrices of a few rows, and what it makes of them is enlarged."""
    matrix, stacked, gate_up = backend.matrix, backend.stacked, backend.gate_up
    known: dict[Any, Any] = {}  # the layers share their matrices

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = make()
        return known[key]

    def load_one(host: Any) -> Matrix:
        if not isinstance(host, _Shape):  # the backend's own call, for stand-ins
            return matrix(host)
        shape = host
        loaded: Matrix = once(shape, lambda: _enlarged(matrix(_stand_in(shape, 1)), shape.shape[0]))
        return loaded

    def load_stacked(hosts: Sequence[Any]) -> tuple[Matrix, ...]:
        # each has its own power of two of rows, so that sums tell who was put together
        made = stacked([_stand_in(host, 1 << i) for i, host in enumerate(hosts)])
        rows = [sum(host.shape[0] for i, host in enumerate(hosts) if part.used_rows // ROWS >> i & 1) for part in made]
        return tuple(_enlarged(part, count) for part, count in zip(made, rows, strict=True))

    def load_gate_up(gate: Any, up: Any) -> Matrix:
        return _enlarged(gate_up(_stand_in(gate, 1), _stand_in(up, 1)), gate.shape[0] + up.shape[0])

    def enlarge_experts(made: Matrix, rows: int, num_experts: int) -> Matrix:
        return replace(_enlarged(made, rows), num_experts=num_experts)

    def load_experts(host: Any, count: int) -> Matrix:
        if not isinstance(host, _Shape):
            return expert_matrix(host, count)
        rows = host.shape[0]
        loaded: Matrix = once((host, count), lambda: enlarge_experts(expert_matrix(_stand_in(host, 1), 1), rows, count))
        return loaded

    def load_gated_experts(gate: Any, up: Any, count: int) -> Matrix:
        stand_ins, rows = (_stand_in(gate, 1), _stand_in(up, 1)), gate.shape[0] + up.shape[0]
        return enlarge_experts(expert_gate_up(*stand_ins, 1), rows, count)

    expert_matrix, expert_gate_up = backend.expert_matrix, backend.expert_gate_up
    patched: Any = backend
    patched.expert_matrix = load_experts
    patched.expert_gate_up = lambda gate, up, count: once(
        (gate, up, count), lambda: load_gated_experts(gate, up, count)
    )
    patched.matrix = load_one
    patched.stacked = lambda hosts, num_kv_heads=None: once(tuple(hosts), lambda: load_stacked(hosts))
    patched.gate_up = lambda gate, up: once((gate, up, "gated"), lambda: load_gate_up(gate, up))
    return backend


def _b_over_a(b: _Shape, a: _Shape) -> _Shape:
    return _Shape(b.kind, (b.shape[0] + a.shape[0], b.shape[1]))


def _stand_in(host: _Shape, blocks: int) -> HostMatrix:
    """A matrix of the same kind and width, with `blocks` blocks of rows."""
    from tinyvllm.model.weights.random import RandomWeights

    return RandomWeights(host.kind, 0).take("", (ROWS * blocks, host.shape[1]))


def _enlarged(matrix: Matrix, rows: int) -> Matrix:
    """The same with this many rows, in planes that are never allocated."""
    from tinygrad import Tensor

    padded = -(-rows // ROWS) * ROWS
    planes = tuple(
        Tensor.empty(plane.numel() * padded // matrix.num_rows, dtype=plane.dtype, device=plane.device)
        for plane in matrix.planes
    )
    return replace(matrix, num_rows=padded, used_rows=rows, planes=planes)


# -- reading what was made ---------------------------------------------------------------------------------------------


def _facts(settings: Settings, graph: Any) -> GraphFacts:
    from tinygrad.uop.ops import Ops

    instance = graph.instances[0]
    before = settings.num_command_buffers
    instance.run()
    command_buffers = settings.num_command_buffers - before
    name = graph.bucket.name
    # what a step with logits processing launches apart is a graph of its own
    calls = [(name, call) for call in instance.step.calls] + [
        (f"{name} processed", call) for call in instance.processed.calls
    ]
    kernels = [(where, call) for where, call in calls if call.target.op is Ops.PROGRAM]
    counts = Counter((where, call.target) for where, call in kernels)
    offsets = {(where, call.target): max(buffer.offset for buffer in call.buffers) for where, call in kernels}
    programs = tuple(_program(where, uop, count, offsets[where, uop]) for (where, uop), count in counts.items())
    return GraphFacts(name, len(instance.step.calls), command_buffers, len(calls) - len(kernels), programs)


def _program(graph: str, uop: Any, launches: int, offset: int) -> Program:
    source = uop.src[2].arg
    threads = int(np.prod([int(size) for size in uop.arg.local_size or (1,)]))
    try:
        kernel = read_kernel(source)
    except MslError as error:
        return Program(graph, uop.arg.name, launches, 0, 0, threads, (str(error),))
    over = refusals(kernel)  # among them more than 31 arguments, double, vectors of 8
    if kernel.threadgroup_bytes > MAX_THREADGROUP_BYTES:
        over.append(f"{kernel.threadgroup_bytes} bytes of threadgroup memory")
    if threads > MAX_THREADS:
        over.append(f"{threads} threads")
    if kernel.uses_matrices and threads % SIMDGROUP:
        over.append(f"matrices among {threads} threads")
    if offset > MAX_OFFSET:
        over.append(f"a buffer at offset {offset}")
    return Program(graph, kernel.name, launches, len(kernel.params), kernel.threadgroup_bytes, threads, tuple(over))


# -- the command -------------------------------------------------------------------------------------------------------


def table(graphs: Sequence[GraphFacts]) -> str:
    lines = [f"{'program':60} {'launches':>8} {'arguments':>9} {'threadgroup':>11} {'threads':>7}  over a limit"]
    for graph in graphs:
        lines.append(
            f"-- {graph.name}: {graph.kernels} kernels in {graph.command_buffers} command buffers, "
            f"{graph.others} launches that are no kernel"
        )
        for program in graph.programs:
            name = program.name if program.graph == graph.name else f"{program.name} (processed)"
            lines.append(
                f"{name:60} {program.launches:8} {program.arguments:9} {program.threadgroup_bytes:11} "
                f"{program.threads:7}  {'; '.join(program.over) or '-'}"
            )
    most = max((program.arguments for graph in graphs for program in graph.programs), default=0)
    largest = max((program.threadgroup_bytes for graph in graphs for program in graph.programs), default=0)
    lines.append(
        f"at most {most} arguments of {MAX_BUFFERS}, {largest} bytes of threadgroup memory of {MAX_THREADGROUP_BYTES}"
    )
    return "\n".join(lines)


def summary(case: Case, graphs: Sequence[GraphFacts]) -> str:
    """A line of docs/METAL.md's table."""
    programs = [program for graph in graphs for program in graph.programs]
    most = (
        max(program.arguments for program in programs),
        f"{max(program.threadgroup_bytes for program in programs):,}",
        max(program.threads for program in programs),
        " / ".join(str(graph.kernels) for graph in graphs),
        len(over_limits(graphs)),
    )
    facts = (case.shape, case.family, case.kind, len(graphs), len(programs), *most)
    return f"| {' | '.join(map(str, facts))} |"


def over_limits(graphs: Sequence[GraphFacts]) -> list[str]:
    """Each break of a limit, in words."""
    found = [
        f"{program.graph}: {program.name}: {reason}"
        for graph in graphs
        for program in graph.programs
        for reason in program.over
    ]
    return found + [f"{graph.name}: {graph.others} launches split the graph" for graph in graphs if graph.others]


def main() -> int:
    parser = argparse.ArgumentParser(description="Programs of a shape's graphs on METAL, with Metal's limits.")
    parser.add_argument("--shape", default="llama-3.2-1b", help="tinyllama-1.1b, llama-3.1-8b, qwen3-0.6b, ...")
    parser.add_argument("--family", choices=FAMILIES, default="Apple7")
    parser.add_argument("--kind", default="float16", help="of the matrices: float16, bfloat16, Q4_0, Q4_K, Q8_0, ...")
    parser.add_argument("--decode", type=int, nargs="+", default=DECODE, help="batches")
    parser.add_argument("--prefill", type=int, nargs="+", default=PREFILL, help="tokens")
    parser.add_argument("--whole", action="store_true", help="record every layer")
    flags = parser.parse_args()
    from tests.metal.plugin import settings  # makes METAL a device, simulated

    if settings is None:
        parser.error("the simulator does not run on a Mac")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_DIR_VARIABLE] = folder  # nothing of this is kept for an engine
        case = Case(flags.shape, flags.family, flags.kind, tuple(flags.decode), tuple(flags.prefill))
        graphs = graphs_of(settings, case, is_whole=flags.whole)
    print(table(graphs))
    print(summary(case, graphs))
    found = over_limits(graphs)
    print(f"{len(found)} over a limit", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
