"""How much of the arithmetic's peak a kernel reaches on Apple's GPUs, argued from what its simdgroups issue.

A core has four schedulers, each of which issues one instruction of one simdgroup in a cycle. A product of two 8 x 8
matrices keeps a scheduler's units busy for 17 cycles, where 16 would be the peak; every other instruction takes a cycle
from it. So a kernel's share of the peak is at most 16 * products / (17 * products + other instructions). What is left
out (waiting at barriers and for memory, other kernels of a step, uneven shares of cores) is one factor, `REST`, taken
from what llama.cpp's kernel, whose instructions can be counted in its source in the same way, reaches in whole prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tinyvllm.profiling.chips import CHIPS, Chip

BENCHMARKS = "github.com/philipturner/metal-benchmarks"
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


class Issued(Protocol):
    """What a kernel's simdgroup issues, as tinyvllm.ops.kernel.metal_counts counts it."""

    @property
    def products(self) -> float: ...
    @property
    def beside(self) -> float: ...
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
    """A kernel of a prompt. `flops`: useful operations of one launch, of `launches` in a step. `issue_cycles`: of all
    its simdgroups together."""

    name: str
    flops: float
    launches: int
    issue_cycles: float
    issued: Issued
    is_attention: bool = False

    @property
    def share(self) -> float:
        """Of the peak, if schedulers never wait."""
        return self.flops / PRODUCT_FLOPS * PEAK_CYCLES / self.issue_cycles

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
            f"{self.name}: {self.share:.0%} of the peak by counts. A product comes with {one.shared_loads / per:.2f} "
            f"loads ({one.shared_load_bytes * 32 / per:.0f} bytes) from threadgroup memory, "
            f"{one.device_loads / per:.2f} from the device's, and {one.beside / per:.2f} instructions in all; "
            f"{per / max(1.0, one.barriers):.0f} products between barriers; {one.registers} registers{spills} and "
            f"{one.threadgroup_bytes:,} bytes of threadgroup memory: {self.resident} simdgroups on a core"
        )


def issue_cycles(counts: Issued) -> float:
    """Cycles of a scheduler for one simdgroup."""
    return max(PRODUCT_CYCLES * counts.products + counts.beside, counts.complex_cycles)


# -- what others reach -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A published speed of llama.cpp's kernel for prompts (`kernel_mul_mm`: tiles of 64 x 32 by four simdgroups, 4 x 2
    accumulators each, steps of 32 columns). `beside`: what a simdgroup issues in a step beside its 32 products."""

    chip: str
    what: str
    tok_s: float
    flops: float  # a token's
    beside: int
    source: str

    @property
    def share(self) -> float:
        """Of the peak."""
        return self.tok_s * self.flops / (CHIPS[self.chip].half_tflops * 1e12)

    @property
    def counted(self) -> float:
        """Of the peak, by counts."""
        return PEAK_CYCLES * 32 / (PRODUCT_CYCLES * 32 + self.beside)


# 24 loads of operands, 18 stores and 4 loads of tiles, 2 barriers, 11 for addresses and the loop; besides, to unpack 16
# weights: 57 with Q4_0 (9 loads, and for each weight a mask, a conversion and a fused product), 81 with Q4_K
DENSE, Q4_0, Q4_K = 59, 116, 140
LLAMA_8B, LLAMA_7B = 14.09e9, 13.35e9  # 2 * weights in layers and head (of the 7B at each token), and attention
NORMIE = "github.com/brand-o/normiebench/issues/{}"
SPEEDUP = "github.com/ggml-org/llama.cpp/pull/3084"
PUBLISHED = (
    Published("m1-max", "Llama-3.1-8B Q4_K_M", 499.6, LLAMA_8B, Q4_K, NORMIE.format(40)),
    Published("m4", "Llama-3.1-8B Q4_K_M", 224.8, LLAMA_8B, Q4_K, NORMIE.format(3)),
    Published("m2-ultra", "LLaMA-7B F16, 2023", 1265.3, LLAMA_7B, DENSE, SPEEDUP),
    Published("m2-ultra", "LLaMA-7B Q4_0, 2023", 1164.0, LLAMA_7B, Q4_0, SPEEDUP),
)
REST = round(PUBLISHED[0].share / PUBLISHED[0].counted, 2)  # of the M1 Max; see `rest_lines`


def rest_lines() -> list[str]:
    """What the factor rests on, and how far it is off elsewhere."""
    lines = [
        f"{REST:.0%} of that is left in a whole prompt: llama.cpp on an M1 Max ({PUBLISHED[0].tok_s:.0f} tok/s of "
        f"{PUBLISHED[0].what}, {PUBLISHED[0].source}) reaches {PUBLISHED[0].share:.0%} of the peak, where its kernel's "
        f"counts argue {PUBLISHED[0].counted:.0%}"
    ]
    for other in PUBLISHED[1:]:
        ruled = other.counted * REST / other.share - 1
        lines.append(
            f"by the same rule llama.cpp's {other.what} on {other.chip} ({other.tok_s:,.0f} tok/s: {other.source}) "
            f"would be {ruled:+.0%}"
        )
    return lines


# -- a prompt ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptArithmetic:
    """The shares of the peak that a prompt's products and its attention reach, and why."""

    products: float
    attention: float
    lines: tuple[str, ...]


def prompt_arithmetic(kernels: Sequence[CountedKernel], chip: Chip) -> PromptArithmetic:
    """Of a prompt that launches these kernels."""
    by_kind = [[kernel for kernel in kernels if kernel.is_attention is wanted] for wanted in (False, True)]
    products, attention = (_share(some) for some in by_kind)
    lines = [
        f"{products:.0%} of the peak for products and {attention:.0%} for attention, by counts: 17 cycles a product of "
        f"8 x 8 instead of 16, and one for each other instruction ({BENCHMARKS})",
        *rest_lines(),
        *(kernel.line for kernel in kernels),
        f"occupancy: {SHARED_BYTES >> 10} KiB of threadgroup memory and 208 KiB of registers on a core ({BENCHMARKS}; "
        f"{MESA}); a product's results are ready after {PRODUCT_LATENCY} cycles, so two independent ones keep a "
        f"scheduler busy, or two simdgroups",
    ]
    own = next((one for one in PUBLISHED if one.chip == chip.name and one.flops == LLAMA_8B), None)
    if own is not None:
        lines.append(
            f"llama.cpp computes {own.what}'s prompts at {own.tok_s:.0f} tok/s on {own.chip}; by counts these kernels "
            f"take {own.counted / products:.0%} of its kernel's time with Q4_K"
        )
    return PromptArithmetic(products * REST, attention * REST, tuple(lines))


def _share(kernels: Sequence[CountedKernel]) -> float:
    """Of all launches together; 1 without kernels."""
    flops = sum(kernel.flops * kernel.launches for kernel in kernels)
    cycles = sum(kernel.issue_cycles * kernel.launches for kernel in kernels)
    return flops / PRODUCT_FLOPS * PEAK_CYCLES / cycles if cycles else 1.0
