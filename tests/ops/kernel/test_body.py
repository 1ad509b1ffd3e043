"""The building blocks of kernels, and the pitfalls of tinygrad that the code around them avoids.
On a GPU: DEV=CL python -m pytest -m gpu tests/ops"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit, UOp
from tinygrad.engine.jit import JitError

from tinyvllm.device.handle import DeviceHandle
from tinyvllm.errors import InvariantError
from tinyvllm.ops.kernel.body import Body, empty, exp2, fill, finish, log2, run_kernel


def apply(device: DeviceHandle, function: Callable[[UOp], UOp], x: np.ndarray) -> np.ndarray:
    """function(x), element by element, in a kernel."""

    def kernel(out: UOp, values: UOp) -> UOp:
        i = Body().loop(len(x))
        return finish(out[i].store(function(values[i].load())).end(i), "apply")

    return run_kernel(kernel, [empty(len(x), device=device.name)], [device.upload(x)])[0].numpy()


def test_exp2_is_right_to_three_parts_in_ten_million(device: DeviceHandle, kind: str) -> None:
    x = np.linspace(-126, 126, 100_001).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(apply(device, exp2, x) / exact - 1).max() < 3e-7
    whole = np.arange(-126, 127, dtype=np.float32)
    np.testing.assert_array_equal(apply(device, exp2, whole), np.exp2(whole))


def test_exp2_is_clamped(device: DeviceHandle, kind: str) -> None:
    x = np.array([-1e30, -200.0, 200.0, 1e30], np.float32)
    np.testing.assert_array_equal(apply(device, exp2, x), np.exp2(np.array([-126, -126, 126, 126], np.float32)))


def test_log2_is_right_to_a_millionth(device: DeviceHandle, kind: str) -> None:
    x = np.concatenate([np.geomspace(1.2e-38, 3e38, 50_001), np.linspace(0.5, 2, 50_001)]).astype(np.float32)
    exact = np.log2(x.astype(np.float64))
    error = np.abs(apply(device, log2, x) - exact)
    assert (error / np.maximum(1, np.abs(exact))).max() < 1e-6
    assert error[np.abs(x - 1) < 0.01].max() < 2e-7
    largest_uniform = np.float32(1 - 2.0**-24)  # sampling divides by its logarithm
    assert apply(device, log2, np.array([largest_uniform, 1.0], np.float32))[0] < 0


# -- traps -----------------------------------------------------------------------------------------------------------


def test_a_loop_whose_length_is_data_runs_as_often_as_it_says(device: DeviceHandle, kind: str) -> None:
    def kernel(out: UOp, count: UOp) -> UOp:
        body = Body()
        total = fill(body, body.registers(1), 0.0)
        step = body.fold_while(count[0].load().maximum(0).minimum(100))
        inner = total.after(step)
        end = inner[0].store(inner[0].load() + 1.0).end(step)
        return finish(out[0].store(total.after(end)[0].load()), "count")

    for count in (0, 1, 7, 100):
        out = run_kernel(kernel, [empty(1, device=device.name)], [device.upload(np.array([count], np.int32))])[0]
        assert out.numpy().tolist() == [count]


def test_a_loop_that_runs_at_most_once_is_refused() -> None:
    """tinygrad drops such a loop, and with it the order of the stores around it: results come out wrong, in silence."""
    count = UOp.placeholder((1,), Tensor([0]).dtype, 0)[0].load()
    with pytest.raises(InvariantError, match="a loop of at most 1 iterations cannot order its stores"):
        Body().fold_while(count.maximum(0).minimum(1))


def test_a_captured_graph_freezes_the_python_numbers_it_was_captured_with() -> None:
    """So every value that changes from step to step is in the input buffer."""

    @TinyJit
    def step(x: Tensor, number: int) -> Tensor:
        return (x + number).realize()

    x = Tensor([0.0]).realize()
    assert [step(x, number).item() for number in (1, 2, 3, 4)] == [1.0, 2.0, 2.0, 2.0]


def test_a_captured_graph_overwrites_its_earlier_output() -> None:
    """So a step's tokens are copied out before the next step runs."""

    @TinyJit
    def step(x: Tensor) -> Tensor:
        return (x * 2).realize()

    for warm in (1.0, 2.0):
        step(Tensor([warm]).realize())
    first = step(Tensor([3.0]).realize())
    assert first.tolist() == [6.0]
    step(Tensor([4.0]).realize())
    assert first.tolist() == [8.0]


def test_a_captured_graph_takes_one_shape() -> None:
    """So there is one graph a bucket, and plans are padded to it."""

    @TinyJit
    def step(x: Tensor) -> Tensor:
        return (x * 2).realize()

    for _ in range(3):
        step(Tensor.ones(2, 4).clone().realize())
    with pytest.raises(JitError):
        step(Tensor.ones(2, 5).clone().realize())
