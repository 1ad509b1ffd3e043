"""The activations of gated feed-forwards: one table for all devices and for the plain reference.

A gated feed-forward computes `activation(gate) * up` (Shazeer 2020, "GLU Variants Improve Transformer").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import erf as erf_of_number
from math import pi, sqrt

import numpy as np
from tinygrad import Tensor, UOp

from tinyvllm.ops.kernel.body import bits_of_bfloat

LOG2E = 1.4426950408889634
TIMES, BITS = " * ", " in bfloat16"  # after an activation's name: what precedes a factor; what says `rounded`
CLAMP, ALPHA = 7.0, 1.702  # gpt-oss: gate at most 7, up within +-7; x * sigmoid(1.702 x) approximates GELU

Exp2 = Callable[[UOp], UOp]  # 2 ** x: the device's own, or one that vectorizes


@dataclass(frozen=True)
class Arithmetic:
    """A device's way to compute functions inside kernels. `swish(x, slope)`: x * sigmoid(slope * x), for which a device
    may have something faster than `exp2` and a division."""

    exp2: Exp2
    swish: Callable[[UOp, UOp | float], UOp]


def arithmetic(exp2: Exp2) -> Arithmetic:
    """This exponential, and an exact division."""
    return Arithmetic(exp2, lambda x, slope: x / (exp2(x * (slope * -LOG2E)) + 1.0))


DEVICE_ARITHMETIC = arithmetic(lambda x: x.exp2())  # by the exponential of the device's language


@dataclass(frozen=True)
class Activation:
    """activation(gate) * up: `exact` in NumPy, in the arrays' precision; `plain` on Tensors; `emit` inside a kernel, in
    float32 and by the given arithmetic."""

    exact: Callable[[np.ndarray, np.ndarray], np.ndarray]
    plain: Callable[[Tensor, Tensor], Tensor]
    emit: Callable[[UOp, UOp, Arithmetic], UOp]


def scaled(activation: str, factor: float) -> str:
    """The name of an activation for `gated` whose results are multiplied by a factor."""
    return activation if factor == 1.0 else f"{activation}{TIMES}{factor}"


def rounded(activation: str) -> str:
    """The name of an activation for `gated` whose results are bfloat16's bits, as float16."""
    return f"{activation}{BITS}"


def gated(activation: str, gates: Sequence[UOp], ups: Sequence[UOp], by: Arithmetic = DEVICE_ARITHMETIC) -> list[UOp]:
    """activation(gate) * up, elementwise, inside a kernel, in float32; or as the name from `scaled` or `rounded`
    says."""
    name, _, factor = activation.removesuffix(BITS).partition(TIMES)
    emit = ACTIVATIONS[name].emit
    values = [emit(gate, up, by) for gate, up in zip(gates, ups, strict=True)]
    values = [value * float(factor) for value in values] if factor else values
    return [bits_of_bfloat(value) for value in values] if activation.endswith(BITS) else values


def gated_exact(activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """activation(gate) * up of arrays."""
    return ACTIVATIONS[activation].exact(gate, up).astype(gate.dtype, copy=False)


def gated_plain(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) * up of Tensors."""
    return ACTIVATIONS[activation].plain(gate, up)


def tanh(x: UOp, exp2: Exp2) -> UOp:
    """1 - 2 / (e**2x + 1), which does not overflow: exp2 saturates."""
    return 1.0 - (exp2(x * (2.0 * LOG2E)) + 1.0).reciprocal() * 2.0


def erf(x: UOp, exp2: Exp2) -> UOp:
    """Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7."""
    size = x.maximum(x * -1.0)
    t = (size * 0.3275911 + 1.0).reciprocal()
    poly = t * 1.061405429 - 1.453152027
    for coefficient in (1.421413741, -0.284496736, 0.254829592):
        poly = poly * t + coefficient
    value = 1.0 - poly * t * exp2(size * size * -LOG2E)
    return (x < 0.0).where(value * -1.0, value)


def _silu(gate: UOp, up: UOp, by: Arithmetic) -> UOp:
    return by.swish(gate, 1.0) * up


def _sigmoid(gate: UOp, up: UOp, by: Arithmetic) -> UOp:
    return (by.exp2(gate * -LOG2E) + 1.0).reciprocal() * up


def _gelu_tanh(gate: UOp, up: UOp, by: Arithmetic) -> UOp:
    """gate / 2 * (1 + tanh(u)) = gate * sigmoid(2u), u = sqrt(2 / pi) * (gate + 0.044715 gate**3)."""
    return by.swish(gate, (gate * gate * 0.044715 + 1.0) * (2.0 * sqrt(2.0 / pi))) * up


def _gelu(gate: UOp, up: UOp, by: Arithmetic) -> UOp:
    return gate * 0.5 * (erf(gate * sqrt(0.5), by.exp2) + 1.0) * up


def _clamped_swiglu(gate: UOp, up: UOp, by: Arithmetic) -> UOp:
    return by.swish(gate.minimum(CLAMP), ALPHA) * (up.maximum(-CLAMP).minimum(CLAMP) + 1.0)


def _plain_clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.minimum(CLAMP)
    return gate * (gate * ALPHA).sigmoid() * (up.clip(-CLAMP, CLAMP) + 1.0)


def exact_sigmoid(x: np.ndarray) -> np.ndarray:
    """By tanh, which does not overflow."""
    return (np.tanh(x / 2) + 1) / 2


def _exact_gelu_tanh(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / 2 * (1 + np.tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3))) * up


def _exact_gelu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / 2 * (1 + np.vectorize(erf_of_number, [gate.dtype])(gate / sqrt(2))) * up


def _exact_clamped_swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate = np.minimum(gate, CLAMP)
    return gate * exact_sigmoid(ALPHA * gate) * (np.clip(up, -CLAMP, CLAMP) + 1)


# To add an activation, add a line here; storage/hf_config.py maps config.json's `hidden_act` to these names.
ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(lambda gate, up: gate * exact_sigmoid(gate) * up, lambda gate, up: gate.silu() * up, _silu),
    # of attention's output gate
    "sigmoid": Activation(lambda gate, up: exact_sigmoid(gate) * up, lambda gate, up: gate.sigmoid() * up, _sigmoid),
    "gelu_tanh": Activation(_exact_gelu_tanh, lambda gate, up: gate.gelu() * up, _gelu_tanh),
    "gelu": Activation(_exact_gelu, lambda gate, up: gate * 0.5 * ((gate * sqrt(0.5)).erf() + 1.0) * up, _gelu),
    "clamped_swiglu": Activation(_exact_clamped_swiglu, _plain_clamped_swiglu, _clamped_swiglu),
}
