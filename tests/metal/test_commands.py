"""Command buffers, graphs and the Objective-C runtime of the simulator, under tinygrad's own code."""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.metal.simulator import MetalError, Settings, live_objects, set_family
from tests.metal.simulator.metal_objects import MTLBuffer, MTLIndirectComputeCommand


@pytest.fixture(autouse=True)
def nothing_in_flight() -> Iterator[None]:
    """What a failed command buffer leaves behind in tinygrad, which would report it again."""
    yield
    from tinygrad import Device

    Device["METAL"].mtl_buffers_in_flight.clear()


def chain(length: int) -> Any:
    """A TinyJit of `length` kernels, each adding 1."""
    from tinygrad import Tensor, TinyJit

    def run(x: Tensor) -> Tensor:
        for _ in range(length):
            x = (x + 1).contiguous().realize()
        return x

    return TinyJit(run)


def memory_of(tensor: Any) -> np.ndarray:
    """The tensor's memory itself, without waiting."""
    view = tensor.uop.base.buffer.as_memoryview(force_zero_copy=True, no_sync=True)
    return np.frombuffer(view, np.float32)


# -- when commands run -------------------------------------------------------------------------------------------------


def test_nothing_has_run_before_somebody_waits() -> None:
    from tinygrad import Device, Tensor

    out = (Tensor([1.0, 2.0], device="METAL").realize() + 1).realize()
    assert np.isnan(memory_of(out)).all()
    Device["METAL"].synchronize()
    assert memory_of(out).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("of", ["the input", "the output"])
def test_a_host_that_writes_while_a_replay_is_in_flight_is_found(of: str) -> None:
    from tinygrad import Device, Tensor

    jit, x = chain(3), Tensor([1.0, 2.0], device="METAL").realize()
    for _ in range(3):
        out = jit(x)
    Device["METAL"].synchronize()
    memory_of(x)[:] = 5.0  # nothing is in flight
    out = jit(x)
    assert out.tolist() == [8.0, 8.0]
    jit(x)
    memory_of(x if of == "the input" else out)[:] = 7.0
    with pytest.raises(RuntimeError, match=r"the host wrote into a buffer of 8 bytes.*'batched 3'"):
        Device["METAL"].synchronize()


def test_two_replays_in_flight_read_what_the_first_wrote() -> None:
    from tinygrad import Tensor

    first, second = chain(2), chain(3)
    x = Tensor([1.0], device="METAL").realize()
    for _ in range(3):
        out = second(first(x))
    assert out.tolist() == [6.0]


# -- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernels", "graphs"), [(1, 0), (2, 1), (32, 1), (34, 2), (96, 2), (98, 3), (224, 3), (226, 4)]
)
def test_graphs_are_split_at_32_64_and_128_kernels(simulator: Settings, kernels: int, graphs: int) -> None:
    from tinygrad import Tensor

    jit, x = chain(kernels), Tensor([1.0], device="METAL").realize()
    for _ in range(3):
        before = simulator.num_graph_runs
        out = jit(x)
    assert simulator.num_graph_runs - before == graphs
    assert out.tolist() == [kernels + 1.0]


def test_variables_are_arguments_of_a_graphs_kernels() -> None:
    from tinygrad import Tensor, TinyJit, Variable

    def run(x: Tensor, n: Any) -> Tensor:
        y = (x * n).contiguous().realize()
        return (y + n).realize()

    jit, x = TinyJit(run), Tensor([1.0, 2.0], device="METAL").realize()
    for value in (3, 4, 5, 6):
        assert jit(x, Variable("n", 1, 8).bind(value)).tolist() == [2.0 * value, 3.0 * value]


def test_a_view_is_bound_by_its_offset() -> None:
    from tinygrad import Tensor

    whole = Tensor(np.arange(64, dtype=np.float32), device="METAL").realize()
    assert (whole[16:20].contiguous().realize() + 1).tolist() == [17.0, 18.0, 19.0, 20.0]
    part = whole[32:40]
    assert (part.shrink(((4, 8),)) * 2).tolist() == [72.0, 74.0, 76.0, 78.0]


def test_an_offset_of_more_than_32_bits_does_not_enter_an_indirect_command() -> None:
    from tests.metal.simulator.metal_objects import Command

    command = MTLIndirectComputeCommand(Command(), 31)
    with pytest.raises(MetalError, match="an indirect command keeps 32 bits"):
        command.setKernelBuffer_offset_atIndex_(MTLBuffer(4), 1 << 32, 0)


def test_an_indirect_command_without_a_barrier_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygrad import Tensor

    monkeypatch.setattr(MTLIndirectComputeCommand, "setBarrier", lambda self: None)
    jit, x = chain(3), Tensor([1.0], device="METAL").realize()
    with pytest.raises(MetalError, match="without a barrier"):
        for _ in range(3):
            jit(x)


def test_a_buffer_that_is_not_resident_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygrad import Tensor

    from tests.metal.simulator.metal_objects import MTLComputeCommandEncoder

    monkeypatch.setattr(
        MTLComputeCommandEncoder, "useResources_count_usage_", lambda self, resources, count, usage: None
    )
    jit, x = chain(3), Tensor([1.0], device="METAL").realize()
    with pytest.raises(MetalError, match="not among those of useResources"):
        for _ in range(3):
            jit(x)


@pytest.fixture
def an_m1(simulator: Settings) -> Iterator[None]:
    set_family(simulator, "Apple7")
    yield
    set_family(simulator, "Apple9")


def test_an_m1_needs_its_pipelines_in_the_encoder(an_m1: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """tinygrad's way around is taken by the family; without it a real M1 faults."""
    from tinygrad import Tensor
    from tinygrad.runtime.graph import metal as graph

    x = Tensor([1.0], device="METAL").realize()
    jit = chain(3)
    for _ in range(3):
        out = jit(x)
    assert out.tolist() == [4.0]
    monkeypatch.setattr(graph, "getenv", lambda name, default: 0)
    jit = chain(3)
    with pytest.raises(MetalError, match="pipeline not resident"):
        for _ in range(3):
            jit(x)


def test_a_virtual_gpu_has_no_graphs(simulator: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygrad.runtime.ops_metal import MetalDevice

    assert MetalDevice("METAL:1").graph is not None
    monkeypatch.setattr(simulator, "name", "Apple Paravirtual device")
    assert MetalDevice("METAL:1").graph is None


@pytest.mark.parametrize(("family", "has_matrices", "has_bfloat"), [("Apple7", True, True), ("Mac2", False, False)])
def test_families_have_what_tinygrad_says(
    simulator: Settings, family: str, has_matrices: bool, has_bfloat: bool
) -> None:
    from tinygrad import Device, dtypes

    set_family(simulator, family)
    renderer = Device["METAL"].renderer
    set_family(simulator, "Apple9")
    assert renderer.target.arch == family
    assert bool(renderer.tensor_cores) == has_matrices
    assert (dtypes.bfloat16 in renderer.supported_dtypes()) == has_bfloat


# -- objects -----------------------------------------------------------------------------------------------------------


def objects_left_by(run: Callable[[], object], times: int) -> Counter[str]:
    """What is there after `times` runs, and was not after the first ones."""
    from tinygrad import Device

    counts = []
    for count in (4, times):
        for _ in range(count):
            run()
            Device["METAL"].synchronize()
        gc.collect()
        counts.append(live_objects())
    return counts[1] - counts[0]


def test_replays_leave_no_objects_behind_where_no_input_is_replaced() -> None:
    """Our graphs are of this kind: their inputs are written in place. A replaced input costs tinygrad an object each
    time: it asks for the command to change, which nobody releases."""
    from tinygrad import Tensor, TinyJit

    x = Tensor([1.0], device="METAL").realize()

    def fixed() -> Tensor:
        return ((x + 1).contiguous().realize() * 2).realize()

    assert objects_left_by(TinyJit(fixed), 20) == {}
    replaced = chain(2)
    assert objects_left_by(lambda: replaced(x), 20) == {"MTLIndirectComputeCommand": 20}


def send(selector: str, *args: Any, types: tuple[Any, ...] = ()) -> Callable[..., Any]:
    from tinygrad.runtime.support import objc

    result: Callable[..., Any] = objc.msg(selector, objc.id_, list(types))
    return result


def test_messages_to_what_was_released_and_unknown_messages_are_found() -> None:
    from tinygrad.runtime.autogen import metal

    buffer = MTLBuffer(8)
    pointer = metal.MTLBuffer(buffer.address)
    with pytest.raises(RuntimeError, match=r"\[MTLBuffer didModifyRange:\] is not simulated"):
        send("didModifyRange:")(pointer, 0)
    buffer.release()
    with pytest.raises(RuntimeError, match="it was released before"):
        pointer.contents()
    assert metal.MTLBuffer(None).contents() is None, "a message to nil gives nil"


def test_arguments_are_held_to_their_types() -> None:
    from tinygrad import Device
    from tinygrad.runtime.autogen import metal

    system = Device["METAL"].sysdevice
    with pytest.raises(OverflowError):
        system.newBufferWithLength_options(1 << 64, 0)
    with pytest.raises(TypeError):
        system.newBufferWithLength_options(8)
    assert system.newBufferWithLength_options(1 << 50, 0).value is None, "more than there is gives nil"
    assert metal.MTLSize(1, 2, 3).height == 2 and ctypes.sizeof(metal.MTLSize) == 24
