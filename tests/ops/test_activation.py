"""Every activation in a kernel and in plain Tensors, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from tinygrad import UOp

from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.activation import ACTIVATIONS, DEVICE_ARITHMETIC, arithmetic, gated, scaled, tanh
from tinyvllm.ops.kernel.body import Body, empty, exp2, finish, run_kernel


def test_the_exact_forms_are_the_formulas() -> None:
    """Against values computed with `math` from the definitions, by sigmoid(x) = 1 / (1 + exp(-x))."""
    gate, up = np.array([-3.0, -0.5, 0.0, 2.0]), np.array([2.0, 1.0, 5.0, -1.0])
    expected = {
        "silu": [-0.2845552390654007, -0.1887703343990727, 0.0, -1.7615941559557646],
        "sigmoid": [0.09485174635513356, 0.3775406687981454, 2.5, -0.8807970779778823],
        "gelu_tanh": [-0.007274784163545989, -0.15428599017485606, 0.0, -1.954597694087775],
        "gelu": [-0.00809938818978062, -0.15426876936299344, 0.0, -1.9544997361036416],
        "clamped_swiglu": [-0.05421392912335791, -0.2992231267872398, 0.0, 0.0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name].exact(gate, up), values, rtol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 1 / 64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_equals_its_formula(device: DeviceHandle, kind: str, name: str, factor: float) -> None:
    gate = np.concatenate([np.linspace(-60, 60, 4001), np.linspace(-4, 4, 4001)]).astype(np.float32)
    up = np.resize(np.array([1.0, -0.3, 9.0], np.float32), gate.size)
    by = arithmetic(exp2) if kind == "cpu" else DEVICE_ARITHMETIC

    def kernel(out: UOp, gates: UOp, ups: UOp) -> UOp:
        i = Body().loop(gate.size)
        (value,) = gated(scaled(name, factor), [gates[i].load()], [ups[i].load()], by)
        return finish(out[i].store(value * (1 / factor)).end(i), f"apply_{name}")

    tensors = [device.upload(gate), device.upload(up)]
    emitted = run_kernel(kernel, [empty(gate.size, device=device.name)], tensors)[0].numpy()
    exact = ACTIVATIONS[name].exact(gate.astype(np.float64), up.astype(np.float64))
    np.testing.assert_allclose(emitted, exact, rtol=4e-6, atol=4e-6)
    np.testing.assert_allclose(ACTIVATIONS[name].plain(*tensors).numpy(), exact, rtol=4e-6, atol=4e-6)


def test_tanh_saturates(device: DeviceHandle, kind: str) -> None:
    x = np.array([-1e30, -50, -1, -1e-3, 0, 1e-3, 1, 50, 1e30], np.float32)

    def kernel(out: UOp, values: UOp) -> UOp:
        i = Body().loop(x.size)
        return finish(out[i].store(tanh(values[i].load(), exp2)).end(i), "apply_tanh")

    found = run_kernel(kernel, [empty(x.size, device=device.name)], [device.upload(x)])[0].numpy()
    np.testing.assert_allclose(found, np.tanh(x.astype(np.float64)), atol=3e-7)
