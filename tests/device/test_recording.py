"""A recorded step runs nothing until it is replayed, and means the same on another process's buffers."""

from __future__ import annotations

import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tinygrad import Device, Tensor
from tinygrad.codegen import to_program_cache
from tinygrad.helpers import Context

from tinyvllm.device import program_store
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.program_store import ProgramStore, environment_key, open_program_store
from tinyvllm.device.recording import bind_step, record, save_step
from tinyvllm.device.replay import make_replay
from tinyvllm.errors import CacheError

VALUES = np.arange(96, dtype=np.int32)


def trace_two_kernels(x: Tensor) -> Tensor:
    return ((x * 3).contiguous() + x.flip(0)).realize()


def expected(values: np.ndarray) -> np.ndarray:
    return values * 3 + values[::-1]


@pytest.fixture
def store(tmp_path: Path, device: DeviceHandle) -> ProgramStore:
    return ProgramStore(tmp_path, device.name)


def test_recording_runs_nothing_and_a_replay_does(device: DeviceHandle) -> None:
    x, count = device.upload(VALUES), device.upload(np.zeros(1, np.int32))
    step = record(lambda: count.assign(count + x[1:2]).realize())
    assert count.numpy().tolist() == [0]
    run = make_replay(device, step)
    for _ in range(3):
        run()
    device.wait()
    assert device.read(count).tolist() == [3]


def test_replays_run_in_order_and_read_what_is_there_when_they_run(device: DeviceHandle) -> None:
    buffer = device.input_buffer(len(VALUES))
    inputs, host, send = buffer.tensor, buffer.host, buffer.send
    step = record(lambda: trace_two_kernels(inputs))
    run = make_replay(device, step)
    for values in (VALUES, VALUES[::-1] * 7):
        host[:] = values
        send()
        run()
        np.testing.assert_array_equal(device.read(step.output), expected(values))


def test_more_replays_than_the_queue_has_entries_may_follow_each_other(device: DeviceHandle) -> None:
    x, count = device.upload(VALUES), device.upload(np.zeros(1, np.int32))
    run = make_replay(device, record(lambda: count.assign(count + x[1:2]).realize()))
    for _ in range(20):
        for _ in range(1000):
            run()
        device.wait()
    assert device.read(count).tolist() == [20_000]


def test_a_replay_that_is_let_go_of_runs_to_its_end(device: DeviceHandle) -> None:
    x, count = device.upload(VALUES), device.upload(np.zeros(1, np.int32))
    for _ in range(100):
        make_replay(device, record(lambda: count.assign(count + x[1:2]).realize()))()
    assert device.read(count).tolist() == [100]


def test_a_saved_step_binds_to_other_buffers(device: DeviceHandle) -> None:
    x, y = device.upload(VALUES), device.upload(VALUES + 5)
    saved = pickle.loads(pickle.dumps(save_step(record(lambda: trace_two_kernels(x)), {"x": x})))
    step = bind_step(saved, {"x": y})
    make_replay(device, step)()
    np.testing.assert_array_equal(device.read(step.output), expected(VALUES + 5))


def test_a_saved_step_holds_no_buffer(device: DeviceHandle) -> None:
    x = device.upload(np.arange(1_000_000, dtype=np.int32))
    assert len(pickle.dumps(save_step(record(lambda: trace_two_kernels(x)), {"x": x}))) < 50_000


def test_a_step_on_a_buffer_without_a_name_is_not_saved(device: DeviceHandle) -> None:
    x = device.upload(VALUES)
    step = record(lambda: trace_two_kernels(x))
    with pytest.raises(CacheError, match="0 copies and 1 buffers without a name"):
        save_step(step, {})


@pytest.mark.parametrize("named", [{}, {"x": 95}], ids=["a missing tensor", "another size"])
def test_a_saved_step_does_not_bind_to_what_does_not_fit(device: DeviceHandle, named: dict[str, int]) -> None:
    x = device.upload(VALUES)
    saved = save_step(record(lambda: trace_two_kernels(x)), {"x": x})
    with pytest.raises(CacheError, match="the saved step reads x"):
        bind_step(saved, {key: device.upload(VALUES[:size]) for key, size in named.items()})


def test_the_second_recording_compiles_nothing(device: DeviceHandle, store: ProgramStore) -> None:
    x = device.upload(VALUES)
    with mock.patch.dict(to_program_cache, clear=True):
        record(lambda: trace_two_kernels(x), store)
    assert (store.num_programs_read, store.num_programs_compiled) == (0, 2)
    second = ProgramStore(store.root, device.name)
    with mock.patch.dict(to_program_cache, clear=True):  # as in a new process
        step = record(lambda: trace_two_kernels(x), second)
    assert (second.num_programs_read, second.num_programs_compiled) == (2, 0)
    make_replay(device, step)()
    np.testing.assert_array_equal(device.read(step.output), expected(VALUES))


def test_what_would_make_programs_wrong_makes_another_folder(
    device: DeviceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [environment_key(device.name)]
    with Context(NOOPT=1):
        keys.append(environment_key(device.name))
    for variable in ("CC", "DMC"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "another")
            keys.append(environment_key(device.name))
    for name in ("_processor", "_compiler", "_sources"):
        with monkeypatch.context() as patch:
            patch.setattr(program_store, name, lambda: "another")
            keys.append(environment_key(device.name))
    with Context(DEBUG=1):  # shows more, and changes nothing
        assert environment_key(device.name) == keys[0]
    assert environment_key(device.name) == keys[0]
    assert len(set(keys)) == len(keys)


def test_another_version_of_nvidias_compiler_makes_another_folder(
    tmp_path: Path, device: DeviceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libnvrtc.so"
    monkeypatch.setattr(program_store, "nvrtc_path", lambda: str(library))
    renderer, facts = Device[device.name].renderer, []
    for content in (b"12.4", b"12.4.1"):
        library.write_bytes(content)
        facts.append([program_store.environment_facts(kind, renderer) for kind in ("CUDA", "CPU")])
    (old, on_cpu), (new, still_on_cpu) = facts
    assert old != new and on_cpu == still_on_cpu


def test_without_a_folder_to_trust_there_is_no_store(
    tmp_path: Path, device: DeviceHandle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TINYVLLM_CACHE", str(tmp_path))
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs").chmod(0o777)
    assert open_program_store(device.name) is None
    assert "chmod go-w" in caplog.text
