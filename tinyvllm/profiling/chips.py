"""Peak rates of chips, each with the source of its figures.

GB is 1e9 bytes. Bandwidths are the manufacturers' own. Apple publishes no FLOPs: its rows follow one rule, GPU cores x
128 lanes x 2 x clock. At that rate float16 is no faster than float32, and the M5's neural accelerators are left out,
since the kernels here use simdgroup matrices. NVIDIA's rates are dense float16 with float32 accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyvllm.errors import ProfilingError

GB, GIB = 1e9, 1 << 30
APPLE_LANES = 128  # per GPU core: github.com/philipturner/metal-benchmarks, "ALUs" per core, Apple 7 and 8
HOPPER = "NVIDIA {} Tensor Core GPU data sheet, nvidia.com/en-us/data-center/{}: SXM; dense is half of the listed rate"


@dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, and their source."""

    name: str
    bandwidth_gbps: float
    half_tflops: float
    source: str
    device: str  # tinygrad's device for it: METAL, CUDA or CPU


def _apple(name: str, bandwidth_gbps: float, cores: int, clock_ghz: float, page: str) -> Chip:
    tflops = cores * APPLE_LANES * 2 * clock_ghz / 1e3
    clock_source = "github.com/philipturner/metal-benchmarks" if clock_ghz < 1.398 else "hmc-tech.com/gpu"
    source = f"{page}; {cores} cores x 128 lanes x 2 x {clock_ghz} GHz ({clock_source})"
    return Chip(name, bandwidth_gbps, round(tflops, 2), source, "METAL")


NEWSROOM = "apple.com/newsroom"
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # 68.25 is LPDDR4X-4266 on 128 bits; Apple says 68
        _apple("m1", 68.25, 8, 1.278, "support.apple.com/111893 (Mac mini 2020), memory 128 bits x 4266 MT/s"),
        _apple("m1-pro", 200, 16, 1.296, f"{NEWSROOM}/2021/10 (M1 Pro and M1 Max)"),
        _apple("m1-max", 400, 32, 1.296, f"{NEWSROOM}/2021/10 (M1 Pro and M1 Max)"),
        _apple("m1-ultra", 800, 64, 1.296, f"{NEWSROOM}/2022/03 (M1 Ultra)"),
        _apple("m2", 100, 10, 1.398, f"{NEWSROOM}/2022/06 (M2)"),
        _apple("m2-pro", 200, 19, 1.398, f"{NEWSROOM}/2023/01 (M2 Pro and M2 Max)"),
        _apple("m2-max", 400, 38, 1.398, f"{NEWSROOM}/2023/01 (M2 Pro and M2 Max)"),
        _apple("m2-ultra", 800, 76, 1.398, f"{NEWSROOM}/2023/06 (M2 Ultra)"),
        _apple("m3", 100, 10, 1.398, f"{NEWSROOM}/2023/10 and support.apple.com (MacBook Pro 14-inch, M3)"),
        _apple("m3-pro", 150, 18, 1.398, "support.apple.com (MacBook Pro 14-inch, M3 Pro)"),
        _apple("m3-max", 400, 40, 1.398, "support.apple.com (MacBook Pro 14-inch, M3 Max): 40 GPU cores, 30 have 300"),
        _apple("m3-ultra", 819, 80, 1.398, f"{NEWSROOM}/2025/03 (M3 Ultra)"),
        _apple("m4", 120, 10, 1.470, f"{NEWSROOM}/2024/05 (M4)"),
        _apple("m4-pro", 273, 20, 1.470, f"{NEWSROOM}/2024/10 (M4 Pro and M4 Max)"),
        _apple("m4-max", 546, 40, 1.470, f"{NEWSROOM}/2024/10 (M4 Pro and M4 Max): 40 GPU cores, 32 have 410"),
        _apple("m5", 153, 10, 1.740, f"{NEWSROOM}/2025/10 (M5)"),
        _apple("m5-pro", 307, 20, 1.740, f"{NEWSROOM}/2026/03 (M5 Pro and M5 Max)"),
        _apple("m5-max", 614, 40, 1.740, f"{NEWSROOM}/2026/03 (M5 Pro and M5 Max): 40 GPU cores, 32 have 460"),
        Chip("h100", 3350, 989.4, HOPPER.format("H100", "h100"), "CUDA"),
        Chip("h200", 4800, 989.4, HOPPER.format("H200", "h200"), "CUDA"),
        Chip(
            "rtx-3090",
            936.2,
            71.2,
            "NVIDIA Ampere GA102 architecture white paper, appendix A: float16 tensor rate with float32 sums, dense",
            "CUDA",
        ),
        Chip(
            "rtx-5090",
            1792,
            209.5,
            "NVIDIA RTX Blackwell architecture white paper, appendix A: float16 tensor rate with float32 sums, dense",
            "CUDA",
        ),
        Chip(
            "rtx-4090",
            1008,
            165.2,
            "NVIDIA Ada GPU architecture white paper, appendix A: float16 tensor rate with float32 sums, dense",
            "CUDA",
        ),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of that name. Case, spaces and a leading "Apple" or "NVIDIA" do not matter. Raises ProfilingError."""
    key = name.lower().removeprefix("apple").removeprefix("nvidia").strip(" -").replace(" ", "-")
    chip = CHIPS.get(key)
    if chip is None:
        raise ProfilingError(f"chip {name!r} is not known; known: {', '.join(CHIPS)}")
    return chip


def guess_chip(hardware: str) -> Chip | None:
    """The chip in a device's own name ("NVIDIA H200", "Apple M4 Max"); None if it is not in the table."""
    words = hardware.lower().replace("geforce", "").replace("-", " ").split()
    text = "-".join(words)
    found = [chip for key, chip in CHIPS.items() if key in text]
    return max(found, key=lambda chip: len(chip.name), default=None)


def measured_chip(name: str, bandwidth: float, flops: float, device: str) -> Chip:
    """A chip with rates measured here, in bytes and operations per second."""
    return Chip(name, bandwidth / GB, flops / 1e12, "measured here: fastest of repeated copies and products", device)
