"""How much of the arithmetic's peak a kernel reaches on Apple's GPUs, argued from what its simdgroups issue.

A core has four schedulers. A product of two 8 x 8 matrices keeps a scheduler's float32 units busy for 17 cycles, where
16 would be the peak. Up to the M2 a scheduler issues one instruction in a cycle, so every other one takes a cycle from
the products: their share of the peak is at most 16 * products / (17 * products + instructions). From the M3 on,
integers, float16 and memory are issued beside float32, and only other float32 instructions take cycles.

What is left out (waiting at barriers and for memory, other kernels of a step, uneven shares of cores) is one factor,
`REST`: what llama.cpp keeps in whole prompts of the share that its kernel's own counts argue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tinyvllm.profiling.chips import CHIPS, Chip

BENCHMARKS = "github.com/philipturner/metal-benchmarks"
PARALLEL = "Explore GPU advancements in M3 and A17 Pro: developer.apple.com/videos/play/tech-talks/111375"
MESA = "gitlab.freedesktop.org/mesa/mesa, src/asahi/compiler/agx_performance.c"
SCHEDULERS = 4  # of a core
PRODUCT_CYCLES, PEAK_CYCLES = 17, 16  # of an 8 x 8 product in float16: measured, and 512 products on 32 lanes
PRODUCT_LATENCY = 34
PRODUCT_FLOPS = 2 * 8 * 8 * 8
SHARED_BYTES = 60 << 10  # threadgroup memory of a core, "~60 KB"
LEAST_SIMDGROUPS = 2  # for each scheduler, so that one issues while the other waits
# (16-bit registers of a thread, threads of a core that have so many)
OCCUPANCY = (
    *((104, 1024), (112, 896), (128, 832), (136, 768), (144, 704)),
    *((160, 640), (184, 576), (208, 512), (232, 448), (256, 384)),
)


Cycles = tuple[float, float]  # of something on chips up to the M2, and from the M3 on


class Issued(Protocol):
    """What a kernel's simdgroup issues, as tinyvllm.ops.kernel.metal_counts counts it."""

    @property
    def products(self) -> float: ...
    @property
    def beside(self) -> float: ...
    @property
    def floats(self) -> float: ...
    @property
    def complex_cycles(self) -> float: ...
    @property
    def shared_loads(self) -> float: ...
    @property
    def shared_load_bytes(self) -> float: ...
    @property
    def device_loads(self) -> float: ...
    @property
    def barriers(self) -> float: ...
    @property
    def registers(self) -> int: ...
    @property
    def threadgroup_bytes(self) -> int: ...
    @property
    def simdgroups(self) -> int: ...


@dataclass(frozen=True)
class CountedKernel:
    """A kernel of a prompt. `flops`: useful operations of one launch, of `launches` in a step. `cycles`: of a scheduler
    for all its simdgroups, on chips up to the M2 and from the M3 on."""

    name: str
    flops: float
    launches: int
    cycles: Cycles
    issued: Issued
    is_attention: bool = False

    @property
    def shares(self) -> Cycles:
        """Of the peak, if schedulers never wait."""
        least = self.flops / PRODUCT_FLOPS * PEAK_CYCLES
        return least / self.cycles[0], least / self.cycles[1]

    @property
    def resident(self) -> int:
        """Simdgroups of a core at once, as its registers and its threadgroup memory allow."""
        counts = self.issued
        threads = next((threads for most, threads in OCCUPANCY if 2 * counts.registers <= most), 0)
        by_registers = threads // 32 // counts.simdgroups
        by_memory = SHARED_BYTES // max(1, counts.threadgroup_bytes)
        return min(by_registers, by_memory) * counts.simdgroups

    @property
    def line(self) -> str:
        """The counts in words, for each product."""
        one = self.issued
        per = max(1.0, one.products)
        spills = "" if self.resident else ", more than a thread has"
        return (
            f"{self.name}: {self.shares[0]:.0%} of the peak by counts up to the M2, {self.shares[1]:.0%} later. A "
            f"product comes with {one.shared_loads / per:.2f} loads ({one.shared_load_bytes * 32 / per:.0f} bytes) "
            f"from threadgroup memory, "
            f"{one.device_loads / per:.2f} from the device's, and {one.beside / per:.2f} instructions in all; "
            f"{per / max(1.0, one.barriers):.0f} products between barriers; {one.registers} registers{spills} and "
            f"{one.threadgroup_bytes:,} bytes of threadgroup memory: {self.resident} simdgroups on a core"
        )


def issue_cycles(counts: Issued) -> Cycles:
    """Of a scheduler for one simdgroup."""
    products = PRODUCT_CYCLES * counts.products
    serial = max(products + counts.beside, counts.complex_cycles)
    return serial, max(products + counts.floats, counts.beside, counts.complex_cycles)


# -- what others reach -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A published speed of prompts, by kernels whose source can be counted. `beside`: what a simdgroup issues beside 32
    products; `floats`: how much of it is float32 arithmetic."""

    chip: str
    what: str
    tok_s: float
    flops: float  # a token's
    beside: int
    floats: int
    source: str

    @property
    def share(self) -> float:
        """Of the peak."""
        return self.tok_s * self.flops / (CHIPS[self.chip].half_tflops * 1e12)

    @property
    def counted(self) -> float:
        """Of the peak, by counts."""
        others = self.floats if generation(self.chip) else self.beside
        return PEAK_CYCLES * 32 / (PRODUCT_CYCLES * 32 + others)


# llama.cpp's kernel_mul_mm has tiles of 64 x 32 by four simdgroups with 4 x 2 accumulators, and steps of 32 columns: 24
# loads of operands, 18 stores and 4 loads of tiles, 2 barriers, 11 for addresses and the loop; besides, to unpack 16
# weights: 57 with Q4_0 (9 loads, and for each weight a mask, a conversion and a fused product), 81 with Q4_K
DENSE, Q4_0, Q4_K = (59, 0), (116, 16), (140, 16)
# MLX's qmm has tiles of 32 x 32 by four simdgroups with 2 x 2 accumulators: a fused product for each of 16 weights
AFFINE = (160, 16)
# of a token: 2 * weights in layers and head (in 2023, of each token), and attention
LLAMA_8B, LLAMA_7B, QWEN_4B = 14.09e9, 13.35e9, 7.87e9
NORMIE = "github.com/brand-o/normiebench/issues/{}"
SPEEDUP = "github.com/ggml-org/llama.cpp/pull/3084"
PUBLISHED = (
    Published("m1-max", "Llama-3.1-8B Q4_K_M by llama.cpp", 499.6, LLAMA_8B, *Q4_K, NORMIE.format(40)),
    Published("m4", "Llama-3.1-8B Q4_K_M by llama.cpp", 224.8, LLAMA_8B, *Q4_K, NORMIE.format(3)),
    Published("m3-pro", "Qwen3-4B by MLX, 4 bits", 615.3, QWEN_4B, *AFFINE, "github.com/ml-explore/mlx-lm/pull/1569"),
    Published("m2-ultra", "LLaMA-7B F16 by llama.cpp, 2023", 1265.3, LLAMA_7B, *DENSE, SPEEDUP),
    Published("m2-ultra", "LLaMA-7B Q4_0 by llama.cpp, 2023", 1164.0, LLAMA_7B, *Q4_0, SPEEDUP),
)


def generation(chip: str) -> int:
    """The place of a chip in `Cycles`."""
    return int(chip[:2] not in ("m1", "m2"))


# four rows by the kernel for prompts, whose tile has 32 tokens: 2 * 32 operations for each of 12.85e9 weights
OVERLAPPED = Published(
    "m1-pro",
    "LLaMA-13B Q4_0 by llama.cpp, 4 rows in a tile of 32",
    18.08,
    2 * 12.85e9 * 32 / 4,
    *Q4_0,
    "github.com/ggml-org/llama.cpp/pull/10491",
)
ONE_ROW_MS = 46.9  # the same model's step of one row there, which memory takes

REST = round(PUBLISHED[0].share / PUBLISHED[0].counted, 2)


def rest_lines() -> list[str]:
    """What the factor rests on, and how far the rule is off elsewhere."""
    first, *others = PUBLISHED
    lines = [
        f"{REST:.0%} of that is left in a whole prompt: {first.what} on {first.chip}, {first.tok_s:,.0f} tok/s "
        f"({first.source}), is {first.share:.0%} of the peak, where the kernel's counts argue {first.counted:.0%}"
    ]
    return lines + [
        f"by that rule, {other.what} on {other.chip}: {other.counted * REST / other.share - 1:+.0%} against "
        f"{other.tok_s:,.0f} tok/s ({other.source})"
        for other in others
    ]


def overlap_line() -> str:
    """Why weights that arrive meanwhile are not added."""
    rule_s = OVERLAPPED.flops / (CHIPS[OVERLAPPED.chip].half_tflops * 1e12 * OVERLAPPED.counted * REST)
    return (
        f"weights arrive while products are computed, so the longer of the two counts: {OVERLAPPED.what}, takes "
        f"{4e3 / OVERLAPPED.tok_s:.0f} ms on {OVERLAPPED.chip}, for {4e3 * rule_s:.0f} by counts; one row takes "
        f"{ONE_ROW_MS:.0f} ms ({OVERLAPPED.source})"
    )


# -- a step ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepArithmetic:
    """The shares of the peak that a step's products and its attention reach, and why. Without attention that is
    counted, its share is 1."""

    products: float
    attention: float
    lines: tuple[str, ...]


def step_arithmetic(kernels: Sequence[CountedKernel], chip: Chip) -> StepArithmetic:
    """Of a step that launches these kernels."""
    place = generation(chip.name)
    by_kind = [[kernel for kernel in kernels if kernel.is_attention is wanted] for wanted in (False, True)]
    products, attention = (_share(some, place) for some in by_kind)
    others = "each other instruction of float32" if place else "each other instruction"
    of_attention = f" and {attention:.0%} for attention" if by_kind[True] else ""
    lines = (
        f"{products:.0%} of the peak for products{of_attention}, by counts: 17 cycles a product of "
        f"8 x 8 instead of 16 ({BENCHMARKS}), and one for {others} ({PARALLEL if place else BENCHMARKS})",
        *rest_lines(),
        *(kernel.line for kernel in kernels),
        f"occupancy: {SHARED_BYTES >> 10} KiB of threadgroup memory and 208 KiB of registers on a core ({BENCHMARKS}; "
        f"{MESA}); a product's results are ready after {PRODUCT_LATENCY} cycles, so two independent ones keep a "
        f"scheduler busy, or two simdgroups",
    )
    return StepArithmetic(products * REST, attention * REST, lines)


def _share(kernels: Sequence[CountedKernel], place: int) -> float:
    """Of all launches together; 1 without kernels."""
    flops = sum(kernel.flops * kernel.launches for kernel in kernels)
    cycles = sum(kernel.cycles[place] * kernel.launches for kernel in kernels)
    return flops / PRODUCT_FLOPS * PEAK_CYCLES / cycles if cycles else 1.0
