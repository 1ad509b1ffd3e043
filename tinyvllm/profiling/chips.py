"""Peak rates of chips, each with the source of its figures.

GB is 1e9 bytes. Bandwidths are the manufacturers' own. Apple publishes no FLOPs: its rows follow one rule, GPU cores x
128 lanes x 2 x clock. At that rate float16 is no faster than float32, and the M5's neural accelerators are left out,
since the kernels here use simdgroup matrices. NVIDIA's rates are dense float16 with float32 accumulation.

A device is one of these chips if it has exactly the name that the chip's maker gives it: "NVIDIA H100 PCIe" is not an
H100, nor "NVIDIA GH200 480GB" an H200. Apple's names do not tell variants apart, so there the number of GPU cores
decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinyvllm.errors import ProfilingError

GB, GIB = 1e9, 1 << 30
APPLE_LANES = 128  # per GPU core: github.com/philipturner/metal-benchmarks, "ALUs" per core, Apple 7 and 8
HOPPER = "NVIDIA {} Tensor Core GPU data sheet, nvidia.com/en-us/data-center/{}: {}; dense is half of the listed rate"
AMPERE = "NVIDIA A100 Tensor Core GPU data sheet, nvidia.com/en-us/data-center/a100: {}"


@dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, and their source."""

    name: str
    bandwidth_gbps: float
    half_tflops: float
    source: str
    device: str  # tinygrad's device for it: METAL, CUDA or CPU
    hardware: str = ""  # the maker's name of the device, in lower case
    gpu_cores: int | None = None  # Apple's
    is_measured: bool = False  # the rates were measured here, so they may be too low


def _apple(name: str, bandwidth_gbps: float, cores: int, clock_ghz: float, page: str) -> Chip:
    """`name`: m3-max, or m3-max-30 of a variant with another bandwidth."""
    tflops = cores * APPLE_LANES * 2 * clock_ghz / 1e3
    clock_source = "github.com/philipturner/metal-benchmarks" if clock_ghz < 1.398 else "hmc-tech.com/gpu"
    source = f"{page}; {cores} cores x 128 lanes x 2 x {clock_ghz} GHz ({clock_source})"
    hardware = f"apple {name.removesuffix(f'-{cores}').replace('-', ' ')}"
    return Chip(name, bandwidth_gbps, round(tflops, 2), source, "METAL", hardware=hardware, gpu_cores=cores)


def _nvidia(name: str, hardware: str, bandwidth_gbps: float, half_tflops: float, source: str) -> Chip:
    return Chip(name, bandwidth_gbps, half_tflops, source, "CUDA", hardware=f"nvidia {hardware}")


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
        _apple("m3-max", 400, 40, 1.398, "support.apple.com (MacBook Pro 14-inch, M3 Max)"),
        _apple("m3-max-30", 300, 30, 1.398, "support.apple.com (MacBook Pro 14-inch, M3 Max)"),
        _apple("m3-ultra", 819, 80, 1.398, f"{NEWSROOM}/2025/03 (M3 Ultra)"),
        _apple("m4", 120, 10, 1.470, f"{NEWSROOM}/2024/05 (M4)"),
        _apple("m4-pro", 273, 20, 1.470, f"{NEWSROOM}/2024/10 (M4 Pro and M4 Max)"),
        _apple("m4-max", 546, 40, 1.470, f"{NEWSROOM}/2024/10 (M4 Pro and M4 Max)"),
        _apple("m4-max-32", 410, 32, 1.470, f"{NEWSROOM}/2024/10 (M4 Pro and M4 Max)"),
        _apple("m5", 153, 10, 1.740, f"{NEWSROOM}/2025/10 (M5)"),
        _apple("m5-pro", 307, 20, 1.740, f"{NEWSROOM}/2026/03 (M5 Pro and M5 Max)"),
        _apple("m5-max", 614, 40, 1.740, f"{NEWSROOM}/2026/03 (M5 Pro and M5 Max)"),
        _apple("m5-max-32", 460, 32, 1.740, f"{NEWSROOM}/2026/03 (M5 Pro and M5 Max)"),
        _nvidia("h100", "h100 80gb hbm3", 3350, 989.4, HOPPER.format("H100", "h100", "SXM")),
        _nvidia("h100-pcie", "h100 pcie", 2000, 756, HOPPER.format("H100", "h100", "PCIe")),
        _nvidia("h100-nvl", "h100 nvl", 3900, 835, HOPPER.format("H100", "h100", "NVL")),
        _nvidia("h200", "h200", 4800, 989.4, HOPPER.format("H200", "h200", "SXM")),
        _nvidia("a100-80gb", "a100-sxm4-80gb", 2039, 312, AMPERE.format("80 GB SXM")),
        _nvidia("a100-80gb-pcie", "a100 80gb pcie", 1935, 312, AMPERE.format("80 GB PCIe")),
        _nvidia(
            "rtx-3090",
            "geforce rtx 3090",
            936.2,
            71.2,
            "NVIDIA Ampere GA102 architecture white paper, appendix A: float16 tensor rate with float32 sums, dense",
        ),
        _nvidia(
            "rtx-5090",
            "geforce rtx 5090",
            1792,
            209.5,
            "NVIDIA RTX Blackwell architecture white paper, appendix A: float16 tensor rate with float32 sums, dense",
        ),
        _nvidia(
            "rtx-4090",
            "geforce rtx 4090",
            1008,
            165.2,
            "NVIDIA Ada GPU architecture white paper, appendix A: float16 tensor rate with float32 sums, dense",
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


def guess_chip(hardware: str, gpu_cores: int | None = None) -> Chip | None:
    """The chip with exactly this name of a device ("NVIDIA H200", "Apple M4 Max"); None if it is not in the table, or
    if it is one of several variants. `gpu_cores`: of a Mac, if they are known."""
    name = " ".join(hardware.lower().split())
    names = (name, f"nvidia {name}")  # earlier drivers leave it out
    found = [chip for chip in CHIPS.values() if chip.hardware in names]
    if gpu_cores is not None:
        found = [chip for chip in found if chip.gpu_cores == gpu_cores] or [
            _with_cores(chip, gpu_cores) for chip in found[:1] if len(found) == 1
        ]
    return found[0] if len(found) == 1 else None


def _with_cores(chip: Chip, cores: int) -> Chip:
    """A chip with fewer GPU cores at the same clock and with the same memory, as the smaller M1 to M5 and Pro."""
    if chip.gpu_cores is None:
        return chip
    tflops = round(chip.half_tflops * cores / chip.gpu_cores, 2)
    return replace(
        chip, half_tflops=tflops, gpu_cores=cores, source=f"{chip.source}; {cores} cores here, {tflops:g} TFLOP/s"
    )


def measured_chip(name: str, bandwidth: float, flops: float, device: str) -> Chip:
    """A chip with rates measured here, in bytes and operations per second."""
    source = "not in the table of chips, so measured here: fastest of repeated copies and products"
    return Chip(name, bandwidth / GB, flops / 1e12, source, device, is_measured=True)
