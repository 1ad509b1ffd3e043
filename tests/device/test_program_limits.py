"""What programs take of a device, read off the programs themselves."""

from __future__ import annotations

import pytest

from tests.ops.builders import normal
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.program_limits import ProgramFacts, program_facts, shared_bytes
from tinyvllm.device.recording import record


@pytest.mark.parametrize(
    ("source", "nbytes"),
    [
        ("kernel void f(device float* a) { threadgroup __attribute__((aligned(16))) float x[256]; }", 1024),
        ("__shared__ __align__(16) half x[64]; __shared__ __align__(16) unsigned char y[10];", 138),
        ("float x[256];", 0),
    ],
)
def test_threadgroup_memory_is_read_off_the_source(source: str, nbytes: int) -> None:
    assert shared_bytes(source) == nbytes


def test_each_limit_is_named_with_its_numbers() -> None:
    facts = ProgramFacts("f", 32, 1025, 33 << 10)
    assert facts.over("METAL") == [
        "f: 32 arguments, METAL has 31",
        "f: 1025 threads, METAL has 1024",
        "f: 33792 bytes of threadgroup memory, METAL has 32768",
    ]
    assert facts.over("CUDA") == ["f: 1025 threads, CUDA has 1024"]
    assert facts.over("CPU") == []
    assert ProgramFacts("f", 31, 1024, 32 << 10).over("METAL") == []


def test_a_step_has_facts_of_each_program_once(device: DeviceHandle) -> None:
    x = device.upload(normal(8))
    step = record(lambda: ((x + 1).contiguous() * 2).contiguous().realize())
    facts = program_facts([*step.calls, *step.calls])
    assert len(facts) == len({call.target for call in step.calls})
    assert all(fact.arguments >= 2 and fact.threads >= 1 for fact in facts)
