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
import faulthandler
import fcntl
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, os.getcwd())  # the checkout that this is run in

import tinyvllm.ops  # noqa: F401  (before tinygrad)
from tests.ops.kernel.products import MIN_LAUNCHES, ROLES, Bench, Product, products_of, values_text
from tinyvllm.bench.shapes import find_shape
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
ROWS, FORMATS = (1, 8, 64, 256, 512), ("float16", "Q4_K", "mlx-4bit-g64", "Q4_0")
TIMED_S, NUM_TIMED = 2e-3, 4  # of a candidate's graph, replayed at least so long each time
LONGEST_S = 10.0  # that a product's candidates may take: a kernel that waits forever ends its process


def pick(spec: Any, task: Task) -> list[Any]:
    """The spec and at most `task.most` other combinations of its knobs: three quarters of them those of the least
    predicted time, or without a prediction those that differ in one knob."""
    from tinyvllm.ops.kernel.tuning import combinations

    first, *others = [one for one in combinations(spec) if one.values == spec.values or _is_wanted(one, task.values)]
    draw = random.Random(task.product)
    if first.predicted_s is None:
        draw.shuffle(others)
        others.sort(key=lambda one: len({*one.values} - {*first.values}) > 1)
    count = 0 if task.is_random else task.most * 3 // 4
    best, rest = others[:count], others[count:]
    return [first, *best, *draw.sample(rest, min(task.most - len(best), len(rest)))]


def _is_wanted(spec: Any, values: Mapping[str, Sequence[int]]) -> bool:
    return all(value in values.get(name, (value,)) for name, value in spec.values)


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A product to measure in another process."""

    product: str
    most: int  # candidates besides the rules' choice
    is_random: bool
    values: Mapping[str, Sequence[int]]  # of knobs, to which candidates are limited
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
    for candidate in pick(spec, task):
        if time.time() > task.end_s:
            break
        with contextlib.suppress(Exception):  # one that cannot be compiled
            replays[values_text(candidate)] = _replay(bench, spec, candidate)
    with _alone(task.lock):
        faulthandler.dump_traceback_later(LONGEST_S, exit=True)
        times = _time_all(bench, replays)
        faulthandler.cancel_dump_traceback_later()
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
    parser.add_argument("--values", default="", help="limit knobs to these values, as in 'ahead=1,2 warps=4,8'")
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
    end_s, values = time.time() + flags.seconds, {}
    for limit in flags.values.split():
        name, _, numbers = limit.partition("=")
        values[name] = tuple(map(int, numbers.split(",")))
    with tempfile.NamedTemporaryFile() as lock, multiprocessing.get_context("spawn").Pool(flags.jobs) as pool:
        tasks = [Task(str(product), flags.most, flags.random, values, end_s, lock.name) for product in products]
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
