"""Print the table of docs/FORMATS.md: a product of each format on one device, against the reference.

    python -m tests.ops.gpu.table --device CPU
    python -m tests.ops.gpu.table --device METAL     # simulated where there is none
    python -m tests.ops.gpu.table --device CUDA

A cell is the largest difference of norm(x) @ w.T from the reference in float32, in units of the largest value.
Activations are in float16 on METAL and CUDA.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os

TOKENS = (1, 8)
SHAPE = (96, 512)  # of the matrix: rows, columns


def measure(job: tuple[str, str]) -> tuple[str, list[float]]:
    """(format, its differences for each count of rows). In a process of its own: the device is chosen first."""
    device_name, fmt = job
    os.environ["DEV"] = device_name
    if device_name == "METAL":
        import tests.metal.plugin  # noqa: F401 - makes METAL a device, simulated where there is none
    from tests.ops.builders import largest_difference
    from tests.ops.gpu.products import multiply
    from tinyvllm.device.handle import open_device
    from tinyvllm.ops.backend import Backend
    from tinyvllm.ops.cpu.backend import CpuBackend
    from tinyvllm.ops.gpu.fused import FusedGpuBackend
    from tinyvllm.ops.kernel.lanes import lanes_of
    from tinyvllm.ops.reference import ReferenceBackend

    device = open_device()
    lanes = lanes_of(device.name)
    backend: Backend = CpuBackend(device, None) if lanes is None else FusedGpuBackend(device, "float16", lanes)
    differences = []
    for tokens in TOKENS:
        case = (fmt, tokens, "norm_linear", *SHAPE)
        differences.append(largest_difference(multiply(backend, *case), multiply(ReferenceBackend(device), *case)))
    assert not backend.coverage.lines(), backend.coverage.lines()
    return fmt, differences


def main() -> None:
    from tests.builders import K_KINDS
    from tests.ops.formats.drawn import BY_NAME

    parser = argparse.ArgumentParser(description="A product of each format against the reference.")
    parser.add_argument("--device", default="CPU", help="CPU, CUDA or METAL")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options = parser.parse_args()
    formats = ["float16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_KINDS, *BY_NAME]
    print("| format | 1 row | 8 rows |\n|---|---|---|")
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for fmt, differences in pool.imap(measure, [(options.device, fmt) for fmt in dict.fromkeys(formats)]):
            print(f"| {fmt} | {' | '.join(f'{difference:.1e}' for difference in differences)} |", flush=True)


if __name__ == "__main__":
    main()
