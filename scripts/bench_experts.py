#!/usr/bin/env python3
"""How near a CPU's products of experts come to the memory's speed, by format and rows of a step.

After each layer's experts, the same step reads as many bytes of another buffer, from a random place, with a kernel that
does nothing else. So the floor is measured beside what it bounds, and other programs slow down both: the quotient of
the two rates holds on a busy machine. Then follows a dense feed-forward of k experts' size, which does the same
multiplications. Rows are random in each run, and so are the experts that they choose.

python scripts/bench_experts.py --shape sparse-100m --weights float16,Q4_K --rows 1,8,64
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.shapes import find_shape
from tinyvllm.config import ExpertsKind, LayerKind, ModelConfig
from tinyvllm.device.handle import open_device
from tinyvllm.device.recording import keep, record
from tinyvllm.model.weights.random import RandomWeights
from tinyvllm.ops.backend import Epilogue, Norm
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.experts_spec import ExpertLayer
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.kernel.body import I32, Body, cached_kernel, clamp, empty, fill, finish, run_kernel
from tinyvllm.ops.timing import make_timer
from tinyvllm.profiling.roofline import experts_touched

if TYPE_CHECKING:
    from tinygrad import Tensor, UOp

LANES = 128  # floats that are compared side by side: eight registers of AVX-512


@dataclass(frozen=True)
class Row:
    """One format and number of rows. Rates: bytes per second of one core, median over layers and runs."""

    weights: str
    num_rows: int
    experts_us: float  # of one layer: its two products, on the slower core
    route_us: float  # router and choice
    rate: float
    floor_rate: float
    share: float  # of the floor: median of pairs of neighbors
    dense_ratio: float  # the experts' time over the dense feed-forward's, likewise
    touched: float  # experts that a layer read, on average


@cached_kernel
def read_kernel(num_floats: int, size: int) -> Callable[..., UOp]:
    """fn(out (LANES,), start (1,) int32, data (size,)): the maximum of `num_floats` from `start` * LANES on."""

    def kernel(out: UOp, start: UOp, data: UOp) -> UOp:
        body = Body()
        best = fill(body, body.registers(LANES), 0.0, start)
        step = body.fold(num_floats // LANES)
        first = clamp(start[0].load(), 0, (size - num_floats) // LANES) * LANES
        lane = body.loop(LANES)
        inner, value = best.after(step), data[first + step * LANES + lane].load()
        best = best.after(inner[lane].store(inner[lane].load().maximum(value)).end(lane, step))
        lane = body.loop(LANES)
        return finish(out[lane].store(best[lane].load()).end(lane), f"read_{num_floats}", nbytes=4 * num_floats)

    return kernel


class Bench:
    """The sparse layers of a shape, with random weights of one format."""

    def __init__(self, config: ModelConfig, weights: str, num_cores: int) -> None:
        assert config.experts is not None, f"{config.name} has no experts"
        self.device = open_device(num_cores)
        kinds = [LayerKind(config.num_heads, config.num_kv_heads, config.head_dim)]
        self.backend, self.kind, self.hidden = CpuBackend(self.device, None, kinds), config.experts, config.hidden_size
        self.weights, self.norm = weights, Norm(self.device.upload(np.ones(self.hidden, np.float32)), 1e-5)
        self.layers = [self._layer(index, self.kind) for index in range(config.num_layers)]
        self.dense = [self._dense(index, self.kind) for index in range(config.num_layers)]
        self.expert_bytes = (self.layers[0].gate_up.nbytes + self.layers[0].down.nbytes) // self.kind.num_experts
        size = self.expert_bytes * self.kind.num_experts * config.num_layers // 4 // LANES * LANES
        self.data = [self.device.upload(np.ones(size // len(self.backend.cores) // LANES * LANES, np.float32))]
        self.data += [self.data[0].to(core).contiguous().realize() for core in self.backend.cores[1:]]

    def _layer(self, index: int, kind: ExpertsKind) -> ExpertLayer:
        random, count = RandomWeights(self.weights, index), kind.num_experts
        router = np.random.default_rng(index).standard_normal((count, self.hidden)).astype(np.float16)
        gate, up = (random.take(name, (count * kind.ffn_size, self.hidden)) for name in ("gate", "up"))
        down = random.take("down", (count * self.hidden, kind.ffn_size))
        return ExpertLayer(
            index=index,
            kind=kind,
            router=self.backend.matrix(router),
            gate_up=self.backend.expert_gate_up(gate, up, count),
            down=self.backend.expert_matrix(down, count),
        )

    def _dense(self, index: int, kind: ExpertsKind) -> tuple[Matrix, Matrix]:
        random, size = RandomWeights(self.weights, index), kind.top_k * kind.ffn_size
        gate, up = (random.take(f"dense {name}", (size, self.hidden)) for name in ("gate", "up"))
        return self.backend.gate_up(gate, up), self.backend.matrix(random.take("dense down", (self.hidden, size)))

    def run(self, num_rows: int, repeats: int) -> Row:
        device, rng = self.device, np.random.default_rng(num_rows)
        x, start = device.upload(np.zeros(num_rows * self.hidden, np.float32)), device.zeros(1, I32)
        step = record(lambda: self._trace(x, start, num_rows))
        names, cores = [call.target.arg.name for call in step.calls], [call.buffers[0].device for call in step.calls]
        timer, routes, touched = make_timer(device, step), [], []
        each: list[tuple[float, float, float]] = []  # of a layer on a core: experts, as many bytes read, dense
        for number in range(repeats + 3):
            device.write(x, rng.standard_normal(num_rows * self.hidden).astype(np.float32))
            device.write(start, np.array([rng.integers(0, int(self.data[0].numel()) // LANES)], np.int32))
            times = [time.seconds for time in timer()]
            if number < 3:
                continue
            for core in set(cores):
                mine = [(name, s) for name, s, at in zip(names, times, cores, strict=True) if at == core]
                each += zip(*(_sums(mine, name) for name in ("experts_", "read_", "dense_")), strict=True)
            routes += _sums(list(zip(names, times, strict=True)), "route", "router")
            chosen = [device.read_ints(ids).reshape(num_rows, -1) for ids in step.kept[: len(self.layers)]]
            touched += [len(np.unique(ids)) for ids in chosen]
        return self._row(num_rows, each, routes, statistics.fmean(touched))

    def _trace(self, x: Tensor, start: Tensor, num_rows: int) -> Tensor:
        y, residual, bytes_read = x, Epilogue(), self._bytes_a_core(num_rows)
        for layer, (gate_up, down) in zip(self.layers, self.dense, strict=True):
            routing = self.backend.route(y, layer, num_rows, self.norm)
            keep(routing.ids)
            y = self.backend.experts(y, routing, layer, num_rows, self.norm, residual)
            residual = Epilogue(residual=y)
            for core, data in zip(self.backend.cores, self.data, strict=True):
                kernel = read_kernel(bytes_read // 4 // LANES * LANES, int(data.numel()))
                run_kernel(kernel, [empty(LANES, device=core)], [start, data])
            gated = Epilogue(activation=self.kind.activation)
            (values,) = self.backend.linear("dense_gate_up", y, [gate_up], num_rows, self.norm, gated)
            self.backend.linear("dense_down", values, [down], num_rows)
        parts = self.backend.parts_of(y)
        parts[0].realize(*parts[1:])
        return parts[0]

    def _bytes_a_core(self, num_rows: int) -> int:
        """Bytes of the experts that a step of so many rows is expected to read, on each core."""
        return round(experts_touched(self.kind, num_rows) * self.expert_bytes / len(self.backend.cores))

    def _row(
        self, num_rows: int, each: Sequence[tuple[float, float, float]], routes: Sequence[float], touched: float
    ) -> Row:
        expected = self._bytes_a_core(num_rows)
        nbytes = touched * self.expert_bytes / len(self.backend.cores)
        experts_s, read_s, _ = (statistics.median(times) for times in zip(*each, strict=True))
        return Row(
            weights=self.weights,
            num_rows=num_rows,
            experts_us=experts_s * 1e6,
            route_us=statistics.median(routes) * 1e6,
            rate=nbytes / experts_s,
            floor_rate=expected / read_s,
            share=statistics.median(nbytes / own * read / expected for own, read, _ in each),
            dense_ratio=statistics.median(own / dense for own, _, dense in each),
            touched=touched,
        )


def _sums(calls: Sequence[tuple[str, float]], *prefixes: str) -> list[float]:
    """The times of calls whose names begin so, added up over neighbors of different names: one sum for each layer."""
    first = next(name for name, _ in calls if name.startswith(prefixes))
    sums: list[float] = []
    for name, seconds in calls:
        if name == first:
            sums.append(seconds)
        elif name.startswith(prefixes):
            sums[-1] += seconds
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="sparse-100m")
    parser.add_argument("--weights", default="float16,Q4_K", help="formats, separated by commas")
    parser.add_argument("--rows", default="1,8,64", help="rows of a step, separated by commas")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cores", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for weights in args.weights.split(","):
        bench = Bench(find_shape(args.shape), weights, args.cores)
        rows += [bench.run(int(count), args.repeats) for count in args.rows.split(",")]
    print(
        "| weights | rows | experts read, a layer | us a layer | routing, us | GB/s a core | floor | share | x dense |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.weights} | {row.num_rows} | {row.touched:.1f} | {row.experts_us:.0f} | {row.route_us:.1f} | "
            f"{row.rate / 1e9:.1f} | {row.floor_rate / 1e9:.1f} | {row.share:.0%} | {row.dense_ratio:.2f} |"
        )
    print(json.dumps({"rows": [vars(row) for row in rows], "environment": describe_environment(0)}))


if __name__ == "__main__":
    main()
