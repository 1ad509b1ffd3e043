"""Time the kernels of matrix products with many values of their knobs, and write a table of them:
DEV=CUDA python scripts/sweep_products.py table.json

A product is a matrix of a well-known shape (its rows N, its columns K), a role (which decides what its kernel does in
addition: a norm, an activation, a residual), a format and a number of token rows. The candidates are the combinations
of the knobs of the kernel that the engine would choose for it (VectorSpec, QuantizedVectorSpec, MatrixSpec, GemmSpec;
docs/KERNELS.md, Tuning).

A candidate is timed in a graph of many launches with other weights each, more in total than the L2 cache holds, as in a
step. With several rows, the graph includes the kernel that adds up partial products, so that splits pay for what they
cost; only qkv's are added up elsewhere (in attention). Kernels are compiled in parallel, and timed one at a time.

The table: {"device": the chip, "products": {"float16 gate_up 28672x4096 T1": {"knobs": [their names], "rule": the
values that the rules choose, "us": {values: microseconds of a launch}}}}. tests/ops/kernel/test_rules.py checks the
present rules against the table in tests/ops/kernel/data. To renew it after a change of kernels or rules:

    DEV=CUDA python scripts/sweep_products.py tests/ops/kernel/data/h200.json --seconds 200

Candidates beyond --most are drawn at random; those that cost.py predicts to be fast come first.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, os.getcwd())  # the checkout that this is run in

import numpy as np

import tinyvllm.ops  # noqa: F401  (before tinygrad)
from tinyvllm.bench.shapes import find_shape
from tinyvllm.config import ModelConfig
from tinyvllm.errors import UnsupportedModelError

SHAPES = (
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "llama-3.2-1b",
    "gemma-3-4b",
    "phi-4-mini",
    "qwen2.5-7b",
    "llama-3.1-8b",
    "qwen2.5-32b",
    "llama-3.1-70b",
)
ROLES = ("qkv", "attention_out", "gate_up", "down", "lm_head")
ROWS, FORMATS = (1, 8, 64, 256), ("float16", "Q4_K")
ROTATED_BYTES = 220_000_000  # of weights in a graph, several times an L2 cache
MIN_LAUNCHES, MAX_COPIES = 8, 12
BLOCK_ROWS = 32  # of a matrix whose bytes are repeated
TIMED_S, NUM_TIMED = 2e-3, 4  # of a candidate's graph, replayed at least so long each time
TEXT = re.compile(r"(\S+) (\S+) (\d+)x(\d+) T(\d+)")


@dataclass(frozen=True)
class Product:
    """A matrix (N, K) and what is done with it."""

    kind: str  # the format
    role: str
    num_rows: int
    num_cols: int
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.kind} {self.role} {self.num_rows}x{self.num_cols} T{self.num_tokens}"

    @classmethod
    def parse(cls, text: str) -> Product:
        """The product of that name. Raises ValueError for any other text."""
        match = TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} does not name a product, as 'float16 gate_up 28672x4096 T1' does")
        kind, role, *sizes = match.groups()
        return cls(kind, role, *map(int, sizes))


def products_of(config: ModelConfig, kind: str, num_tokens: int) -> Iterator[Product]:
    """The products of a step of a model."""
    hidden, ffn, heads = config.hidden_size, config.ffn_size, config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    sizes = ((qkv, hidden), (hidden, heads), (2 * ffn, hidden), (hidden, ffn), (config.vocab_size, hidden))
    for role, (rows, cols) in zip(ROLES, sizes, strict=True):
        yield Product(kind, role, -(-rows // BLOCK_ROWS) * BLOCK_ROWS, cols, num_tokens)


class Bench:
    """A product's operands on a device, and its launches."""

    def __init__(self, backend: Any, product: Product, *, is_dry: bool = False) -> None:
        """Raises UnsupportedModelError if the matrix does not fit the format. `is_dry`: nothing is allocated."""
        from tinygrad import Tensor, dtypes

        from tinyvllm.model.weights.random import RandomWeights

        self.backend, self.product, tokens = backend, product, product.num_tokens
        rows, cols = product.num_rows, product.num_cols
        block = backend.matrix(RandomWeights(product.kind, seed=0).take("w", (BLOCK_ROWS, cols)))
        self.nbytes = block.nbytes * rows // BLOCK_ROWS
        copies = 1 if is_dry else max(2, min(MAX_COPIES, ROTATED_BYTES // self.nbytes + 1))

        def empty(size: int, dtype: Any) -> Any:
            device = backend.device
            return Tensor.empty(size, dtype=dtype, device=device.name) if is_dry else device.zeros(size, dtype)

        own = [_plane_maker(plane, rows // BLOCK_ROWS, is_dry=is_dry) for plane in block.own_planes]
        shared = block.planes[len(own) :]
        self.matrices = [
            replace(block, num_rows=rows, used_rows=rows, planes=(*[make() for make in own], *shared))
            for _ in range(copies)
        ]
        self.x = empty(tokens * cols, dtypes.half)
        self.norm_weight, self.out_norm = empty(cols, dtypes.float), empty(rows, dtypes.float)
        self.residual = empty(tokens * rows, dtypes.half)

    def launch(self, matrix: Any) -> Any:
        """The product, and with several rows the sum of its partial products."""
        from tinyvllm.ops.backend import Epilogue, Norm

        product, backend = self.product, self.backend
        is_one, adds = product.num_tokens == 1, product.role in ("attention_out", "down")
        norm = Norm(self.norm_weight, 1e-5) if is_one and not adds else None
        epilogue = Epilogue(
            activation="silu" if product.role == "gate_up" else None, residual=self.residual if adds else None
        )
        (out,) = backend.linear(product.role, self.x, [matrix], product.num_tokens, norm, epilogue)
        if is_one or product.role in ("qkv", "gate_up"):
            return out
        if product.role == "lm_head":
            return backend.whole(out)
        return backend._normed_rows(out, Norm(self.out_norm, 1e-5), product.num_tokens)

    def launches(self) -> Callable[[], Any]:
        """Launches with each copy of the matrix."""
        count = max(MIN_LAUNCHES, len(self.matrices))
        return lambda: [self.launch(self.matrices[i % len(self.matrices)]) for i in range(count)][-1].realize()

    def spec(self) -> Any:
        """The spec of the product's kernel, with the values that the rules choose."""
        from tinyvllm.ops.kernel import tuning

        tuning.current.asked = _First()
        try:
            self.launch(self.matrices[0])
        except _Found as found:
            return found.args[0]
        finally:
            tuning.current.asked = None
        raise AssertionError(f"{self.product} has no tunable kernel")


class _Found(Exception):
    """Carries a spec."""


class _First(dict[str, Any]):
    """Stops at the first spec for which choices are asked."""

    def __setitem__(self, key: str, spec: Any) -> None:
        raise _Found(spec)


def _plane_maker(plane: Any, times: int, *, is_dry: bool) -> Callable[[], Any]:
    """Makes a plane of a matrix with so many times the rows."""
    from tinygrad import Tensor

    from tinyvllm.device.handle import upload

    if is_dry:
        return lambda: Tensor.empty(plane.numel() * times, dtype=plane.dtype, device=plane.device)
    values = np.tile(plane.numpy().reshape(-1), times)
    return lambda: upload(values, plane.device)


def values_text(spec: Any) -> str:
    """The values of a spec's knobs, as in the table."""
    return " ".join(str(value) for _, value in spec.values)


def pick(spec: Any, most: int, seed: str, *, is_random: bool) -> list[Any]:
    """The spec and at most so many other combinations of its knobs."""
    from tinyvllm.ops.kernel.tuning import candidates, combinations

    first, *others = combinations(spec)
    if not is_random and first.predicted_s is not None:
        best, rest = others[: most * 3 // 4], others[most * 3 // 4 :]
        return [first, *best, *random.Random(seed).sample(rest, min(most - len(best), len(rest)))]
    near = {candidate.values for candidate in candidates(spec)}
    rng = random.Random(seed)
    rng.shuffle(others)
    close = [other for other in others if other.values in near][: most // 2]
    far = [other for other in others if other.values not in near][: most - len(close)]
    return [first, *close, *far]


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A product to measure in another process."""

    product: str
    most: int
    is_random: bool
    end_s: float  # of the clock, when the time is up
    lock: str


def measure(task: Task) -> tuple[str, dict[str, Any] | None]:
    """(the product, its entry in the table; None if it was not measured)."""
    if time.time() > task.end_s:
        return task.product, None
    try:
        return task.product, _measure(task, open_backend())
    except UnsupportedModelError:
        return task.product, None
    except Exception as error:
        print(f"{task.product}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return task.product, None
    finally:
        _free_memory()


def _free_memory() -> None:
    """Return the memory of buffers that are no longer used."""
    from tinygrad import Device

    for backend in _opened:
        backend.device.wait()
        getattr(Device[backend.device.name].allocator, "free_cache", lambda: None)()


def _measure(task: Task, backend: Any) -> dict[str, Any]:
    from tinyvllm.device.hardware import hardware_name

    with _alone(task.lock):
        bench = Bench(backend, Product.parse(task.product))
        backend.device.wait()
    spec, replays = bench.spec(), {}
    for candidate in pick(spec, task.most, task.product, is_random=task.is_random):
        if time.time() > task.end_s:
            break
        with contextlib.suppress(Exception):  # one that cannot be compiled
            replays[values_text(candidate)] = _replay(bench, spec, candidate)
    with _alone(task.lock):
        times = _time_all(bench, replays)
    names, hardware = [name for name, _ in spec.values], hardware_name(backend.device)
    return {"knobs": names, "rule": values_text(spec), "us": times, "device": hardware}


def open_backend() -> Any:
    """The backend of this process's device, opened once."""
    if not _opened:
        from tinyvllm.device.handle import open_device
        from tinyvllm.ops.backends import make_backend

        _opened.append(make_backend(open_device(), "float16", "float16", (), dequantize=False))
    return _opened[0]


_opened: list[Any] = []


def _replay(bench: Bench, spec: Any, candidate: Any) -> Any:
    """The graph of a candidate's launches, compiled."""
    from tinyvllm.device.recording import record
    from tinyvllm.device.replay import make_replay
    from tinyvllm.ops.kernel import tuning

    key = tuning.spec_key(spec)
    tuning.current.chosen[key] = candidate.chosen
    try:
        return make_replay(bench.backend.device, record(bench.launches()))
    finally:
        del tuning.current.chosen[key]


def _time_all(bench: Bench, replays: dict[str, Any]) -> dict[str, float]:
    """Microseconds of a launch of each candidate, the fastest of several times in turn."""
    device, count = bench.backend.device, max(MIN_LAUNCHES, len(bench.matrices))
    best: dict[str, float] = {}
    repeats = 1
    for turn in range(NUM_TIMED + 1):
        for values, replay in replays.items():
            start = time.perf_counter()
            for _ in range(repeats):
                replay()
            device.wait()
            seconds = (time.perf_counter() - start) / repeats
            if turn:
                best[values] = min(best.get(values, seconds), seconds)
            else:
                repeats = max(1, round(TIMED_S / max(seconds, 1e-5)))
    return {
        values: round(seconds / count * 1e6, 2) for values, seconds in sorted(best.items(), key=lambda pair: pair[1])
    }


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Only one process at a time, so that nothing else runs on the device."""
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="where the table is written; products that it has are measured again")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="models whose products are measured")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of tokens")
    parser.add_argument("--weights", default=",".join(FORMATS), help="formats")
    parser.add_argument("--roles", default=",".join(ROLES))
    parser.add_argument("--most", type=int, default=12, help="candidates of a product besides the rules' choice")
    parser.add_argument("--random", action="store_true", help="draw the candidates, to fit a model to their times")
    parser.add_argument("--seconds", type=float, default=200.0, help="stop after this long; the table has what is done")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that compile")
    flags = parser.parse_args()
    shapes, rows = flags.shapes.split(","), [int(count) for count in flags.rows.split(",")]
    wanted = [
        product
        for kind in flags.weights.split(",")
        for tokens in rows
        for shape in shapes
        for product in products_of(find_shape(shape), kind, tokens)
        if product.role in flags.roles.split(",")
    ]
    return sweep(flags, list(dict.fromkeys(wanted)))


def sweep(flags: argparse.Namespace, products: Sequence[Product]) -> int:
    """Measure products, and write the table after each."""
    table: dict[str, Any] = {"products": {}}
    if flags.table.exists():
        table = json.loads(flags.table.read_text(encoding="utf-8"))
    end_s = time.time() + flags.seconds
    with tempfile.NamedTemporaryFile() as lock, multiprocessing.get_context("spawn").Pool(flags.jobs) as pool:
        tasks = [Task(str(product), flags.most, flags.random, end_s, lock.name) for product in products]
        for name, entry in pool.imap_unordered(measure, tasks):
            if entry is None or not entry["us"]:
                continue
            table["device"] = entry.pop("device")
            table["products"][name] = entry
            _write(flags.table, table)
            _print_line(name, entry)
    done = [str(product) for product in products if str(product) in table["products"]]
    print(f"{len(done)} of {len(products)} products are in {flags.table}")
    return 0


def _print_line(name: str, entry: dict[str, Any]) -> None:
    """What was found for a product."""
    best, rule = min(entry["us"], key=entry["us"].get), entry["rule"]
    times = entry["us"]
    shown = "not timed" if rule not in times else f"{times[rule]:.2f} us, {times[rule] / times[best] - 1:.0%} over"
    print(f"{name}: {' '.join(entry['knobs'])}: rule {rule}: {shown} {best}: {times[best]:.2f} us", flush=True)


def _write(path: Path, table: dict[str, Any]) -> None:
    """One product a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(table["products"].items())]
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in table.items() if key != "products")
    path.write_text("{\n" + head + ' "products": {\n' + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
