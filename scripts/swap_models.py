"""Swap two models behind one door again and again, and show that their memory is given back.

    python scripts/swap_models.py smollm2-135m-instruct gemma-3-270m --swaps 50
    python scripts/swap_models.py A B --swaps 50 --json swaps.json -- --device CUDA --max-model-len 4096

Serves both with `--max-loaded 1`, so that each request for the other model ends the one that is loaded. At every tenth
swap it prints the memory of the door's process, of all its models' processes, the computer's available memory, and the
device's free memory if there is nvidia-smi. All of it should stay the same. What follows `--` goes to `tinyvllm serve`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """Memory in MiB after so many swaps, and how long the last one took from request to answer."""

    swaps: int
    door: float
    models: float
    available: float
    device_free: float | None
    seconds: float
    processes: int  # besides the door's own
    descriptors: int  # open files of the door


@contextlib.contextmanager
def serving(models: list[str], flags: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The door's process and its address."""
    named = [f"{name}={model}" for name, model in zip("ab", models, strict=True)]
    command = [sys.executable, "-m", "tinyvllm", "serve", *named, "--max-loaded", "1", "--port", "0", *flags]
    with subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().split(" served on ")[1].split(";")[0].split()[0]
        finally:
            process.terminate()
            process.wait(60)


def ask(address: str, model: str) -> float:
    """Seconds that a short completion took, the model's load included."""
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 4}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    start_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        assert json.load(response)["usage"]["completion_tokens"] == 4
    return time.perf_counter() - start_s


def sample(pid: int, swaps: int, seconds: float) -> Sample:
    below = descendants(pid)
    return Sample(
        swaps=swaps,
        door=memory_of(pid),
        models=sum(memory_of(child) for child in below),
        available=_field(Path("/proc/meminfo"), "MemAvailable"),
        device_free=device_free(),
        seconds=seconds,
        processes=len(below),
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
    )


def descendants(pid: int) -> list[int]:
    """All processes that it started, and those that they started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(each) for each in path.read_text().split()] if path.exists() else []
    return [each for child in children for each in (child, *descendants(child))]


def memory_of(pid: int) -> float:
    """Resident memory in MiB; 0 if the process has ended."""
    with contextlib.suppress(OSError):
        return _field(Path(f"/proc/{pid}/status"), "VmRSS")
    return 0.0


def _field(path: Path, name: str) -> float:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / MIB
    return 0.0


def device_free() -> float | None:
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return None


def swap(models: list[str], num_swaps: int, flags: list[str]) -> list[Sample]:
    samples = []
    with serving(models, flags) as (process, address):
        for number in range(num_swaps + 1):
            seconds = ask(address, "ab"[number % 2])
            if number % 10 == 0:
                samples.append(sample(process.pid, number, seconds))
                show(samples[-1])
    return samples


def show(one: Sample) -> None:
    if one.swaps == 0:
        print("swaps  door MiB  models MiB  available MiB  device free MiB  seconds  processes  descriptors")
    free = "-" if one.device_free is None else f"{one.device_free:.0f}"
    print(
        f"{one.swaps:5}  {one.door:8.1f}  {one.models:10.1f}  {one.available:13.0f}  {free:>15}  {one.seconds:7.2f}  "
        f"{one.processes:9}  {one.descriptors:11}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the samples to this file, too")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    samples = swap(arguments.models, arguments.swaps, flags)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(each) for each in samples]))


if __name__ == "__main__":
    main()
