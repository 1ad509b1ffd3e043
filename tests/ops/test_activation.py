"""Every activation in a kernel and in plain Tensors, against NumPy in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from tinygrad import UOp

from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.activation import ACTIVATIONS, ALPHA, CLAMP, DEVICE_ARITHMETIC, arithmetic, gated, tanh
from tinyvllm.ops.kernel.body import Body, empty, exp2, finish, run_kernel


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


EXACT: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "silu": lambda gate, up: gate * sigmoid(gate) * up,
    "sigmoid": lambda gate, up: sigmoid(gate) * up,
    "gelu_tanh": lambda gate, up: gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up,
    "gelu": lambda gate, up: gate / 2 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) * up,
    "clamped_swiglu": lambda gate, up: (
        np.minimum(gate, CLAMP) * sigmoid(ALPHA * np.minimum(gate, CLAMP)) * (np.clip(up, -CLAMP, CLAMP) + 1)
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_equals_its_formula(device: DeviceHandle, kind: str, name: str) -> None:
    gate = np.concatenate([np.linspace(-60, 60, 4001), np.linspace(-4, 4, 4001)]).astype(np.float32)
    up = np.resize(np.array([1.0, -0.3, 9.0], np.float32), gate.size)
    by = arithmetic(exp2) if kind == "cpu" else DEVICE_ARITHMETIC

    def kernel(out: UOp, gates: UOp, ups: UOp) -> UOp:
        i = Body().loop(gate.size)
        (value,) = gated(name, [gates[i].load()], [ups[i].load()], by)
        return finish(out[i].store(value).end(i), f"apply_{name}")

    tensors = [device.upload(gate), device.upload(up)]
    emitted = run_kernel(kernel, [empty(gate.size, device=device.name)], tensors)[0].numpy()
    exact = EXACT[name](gate.astype(np.float64), up.astype(np.float64))
    np.testing.assert_allclose(emitted, exact, rtol=4e-6, atol=4e-6)
    np.testing.assert_allclose(ACTIVATIONS[name].plain(*tensors).numpy(), exact, rtol=4e-6, atol=4e-6)


def test_tanh_saturates(device: DeviceHandle, kind: str) -> None:
    x = np.array([-1e30, -50, -1, -1e-3, 0, 1e-3, 1, 50, 1e30], np.float32)

    def kernel(out: UOp, values: UOp) -> UOp:
        i = Body().loop(x.size)
        return finish(out[i].store(tanh(values[i].load(), exp2)).end(i), "apply_tanh")

    found = run_kernel(kernel, [empty(x.size, device=device.name)], [device.upload(x)])[0].numpy()
    np.testing.assert_allclose(found, np.tanh(x.astype(np.float64)), atol=3e-7)
