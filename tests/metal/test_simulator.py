"""The simulator itself: right kernels give right values, and kernels that are wrong on purpose are found, by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.metal.simulator import Settings, watching_device_memory
from tests.metal.simulator.msl import MAX_BUFFERS, MslError, read_kernel

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SHARED = "threadgroup __attribute__((aligned(16))) "


def floats(count: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def run(params: str, body: str, *arrays: np.ndarray, threads: int = 32, groups: int = 1) -> list[np.ndarray]:
    from tests.metal.launching import launch, make_source

    return launch(make_source(params, body), arrays, threads=threads, groups=groups)


# -- values ------------------------------------------------------------------------------------------------------------


def test_threads_know_their_places() -> None:
    from tests.metal.launching import launch, make_source

    body = """
  int at = ((gid.z*2+gid.y)*3+gid.x)*24 + (lid.z*3+lid.y)*4+lid.x;
  *(data0_288+at) = ((gid.z*2+gid.y)*3+gid.x)*100 + (lid.z*3+lid.y)*4+lid.x;"""
    source = make_source("device int* data0_288", body)
    (out,) = launch(source, [np.zeros(288, np.int32)], threads=(4, 3, 2), groups=(3, 2, 2))
    assert out.tolist() == [group * 100 + thread for group in range(12) for thread in range(24)]


def test_a_sum_by_a_tree_over_barriers() -> None:
    body = f"""
  {SHARED}float buf0[256];
  *(buf0+lid.x) = *(data1_512+gid.x*256+lid.x);
  {BARRIER}
  for (int half_ = 128; half_ > 0; half_ >>= 1) {{
    float val = lid.x < half_ ? *(buf0+lid.x)+*(buf0+lid.x+half_) : 0.0f;
    {BARRIER}
    if (lid.x < half_) {{ *(buf0+lid.x) = val; }}
    {BARRIER}
  }}
  if (lid.x == 0) {{ *(data0_2+gid.x) = *(buf0+0); }}"""
    values = floats(512)
    out, _ = run("device float* data0_2, device float* data1_512", body, floats(2), values, threads=256, groups=2)
    np.testing.assert_allclose(out, values.reshape(2, 256).sum(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("simd_shuffle_xor(x,5)", lambda x: x[np.arange(32) ^ 5]),
        ("simd_shuffle(x,(lid.x*7)%32)", lambda x: x[np.arange(32) * 7 % 32]),
        ("simd_broadcast(x,3)", lambda x: np.repeat(x[3], 32)),
        ("simd_shuffle_down(x,1)+0.0f", lambda x: np.roll(x, -1)),
        ("simd_shuffle_up(x,1)+0.0f", lambda x: np.roll(x, 1)),
        ("simd_max(x)", lambda x: np.repeat(x.max(), 32)),
        ("simd_min(x)", lambda x: np.repeat(x.min(), 32)),
        ("simd_sum(x)", lambda x: np.repeat(x.sum(), 32)),
    ],
)
def test_lanes_exchange_values(expression: str, expected: object) -> None:
    """In two simdgroups, each among itself."""
    assert callable(expected)
    values = floats(64)
    body = f"  float x = *(data1_64+lid.x);\n  *(data0_64+lid.x) = {expression};"
    out, _ = run("device float* data0_64, device float* data1_64", body, floats(64), values, threads=64)
    np.testing.assert_allclose(out, np.concatenate([expected(values[:32]), expected(values[32:])]), rtol=1e-5)


@pytest.mark.parametrize("kind", ["half", "bfloat", "float"])
def test_a_product_of_simdgroup_matrices(kind: str) -> None:
    body = f"""
  int quad = lid.x/4, row = (quad&4)+(lid.x/2)%4, col = (quad&2)*2+(lid.x%2)*2, at = row*8+col;
  simdgroup_{kind}8x8 a, b; simdgroup_float8x8 c;
  for (int i = 0; i < 2; i++) {{
    a.thread_elements()[i] = ({kind})(*(data1_64+at+i));
    b.thread_elements()[i] = ({kind})(*(data2_64+at+i));
    c.thread_elements()[i] = *(data0_64+at+i);
  }}
  simdgroup_multiply_accumulate(c, a, b, c);
  *(data0_64+at) = c.thread_elements()[0];
  *(data0_64+at+1) = c.thread_elements()[1];"""
    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(-8, 8, 64).astype(np.float32) for _ in range(3))  # exact in every format
    params = "device float* data0_64, device float* data1_64, device float* data2_64"
    out, *_ = run(params, body, c, a, b)
    np.testing.assert_array_equal(out.reshape(8, 8), a.reshape(8, 8) @ b.reshape(8, 8) + c.reshape(8, 8))


def test_half_rounds_after_each_operation() -> None:
    a, b = floats(64, 1).astype(np.float16), floats(64, 2).astype(np.float16)
    body = "  half a = *(data1_64+lid.x), b = *(data2_64+lid.x);\n  *(data0_64+lid.x) = a*b+a/b-(half)(1.0f);"
    params = "device half* data0_64, device half* data1_64, device half* data2_64"
    out, *_ = run(params, body, a, a, b, threads=64)
    np.testing.assert_array_equal(out, a * b + a / b - np.float16(1))


def test_bfloat_rounds_to_the_nearest_even() -> None:
    from tests.builders import encode_floats

    values = np.concatenate([floats(62), np.array([np.inf, -0.0], np.float32)])
    body = "  *(data0_64+lid.x) = (float)((bfloat)(*(data1_64+lid.x)));"
    out, _ = run("device float* data0_64, device float* data1_64", body, values, values, threads=64)
    np.testing.assert_array_equal(out, encode_floats(values, "bfloat16").astype(np.float32))


def test_vectors_are_loaded_taken_apart_and_stored() -> None:
    body = """
  float4 val = (*((device float4*)((data1_128+(lid.x<<2)))));
  half2 pair = half2((half)(val.y),(half)(val.x));
  *((device float4*)((data0_128+(lid.x<<2)))) = float4(val.w,val[2],(float)(pair.x),(float)(pair[1]));"""
    values = floats(128).astype(np.float16).astype(np.float32)
    out, _ = run("device float* data0_128, device float* data1_128", body, values, values)
    np.testing.assert_array_equal(out, values.reshape(32, 4)[:, ::-1].reshape(-1))


def test_new_memory_is_not_zero(simulator: Settings) -> None:
    from tinygrad import Device
    from tinygrad.device import Buffer
    from tinygrad.dtype import dtypes

    buffer = Buffer("METAL", 777, dtypes.float).allocate()
    assert np.isnan(np.frombuffer(Device["METAL"].allocator._as_buffer(buffer._buf), np.float32)).all()


# -- kernels that are wrong on purpose ---------------------------------------------------------------------------------

NEIGHBOR = f"""
  {SHARED}float buf0[64];
  *(buf0+lid.x) = *(data1_64+lid.x);
  %s
  *(data0_64+lid.x) = *(buf0+(lid.x^%d));"""
TWO = "device float* data0_64, device float* data1_64"


def test_a_missing_barrier_is_found_and_the_same_kernel_with_it_is_right() -> None:
    values = floats(64)
    out, _ = run(TWO, NEIGHBOR % (BARRIER, 33), values, values, threads=64)
    np.testing.assert_array_equal(out, values[np.arange(64) ^ 33])
    with pytest.raises(RuntimeError, match=r"race, write after read: kernel tested.*of buf0 at byte \d+, which"):
        run(TWO, NEIGHBOR % ("", 33), values, values, threads=64)


def test_a_simdgroup_barrier_orders_its_own_simdgroup_alone() -> None:
    barrier = "simdgroup_barrier(mem_flags::mem_threadgroup);"
    values = floats(64)
    out, _ = run(TWO, NEIGHBOR % (barrier, 1), values, values, threads=64)
    np.testing.assert_array_equal(out, values[np.arange(64) ^ 1])
    with pytest.raises(RuntimeError, match="race, "):
        run(TWO, NEIGHBOR % (barrier, 32), values, values, threads=64)


def test_a_missing_barrier_before_memory_is_written_again_is_found() -> None:
    body = f"""
  {SHARED}float buf0[64];
  for (int i = 0; i < 2; i++) {{
    *(buf0+lid.x) = *(data1_64+lid.x)+i;
    {BARRIER}
    *(data0_64+lid.x) = *(buf0+(lid.x^1));
  }}"""
    with pytest.raises(RuntimeError, match="race, read after write"):
        run(TWO, body, floats(64), floats(64), threads=64)


def test_a_missing_barrier_after_one_thread_has_written_for_all_is_found() -> None:
    body = f"""
  {SHARED}float buf0[1];
  if (lid.x == 0) {{ *(buf0+0) = 1.0f; }}
  *(data0_64+lid.x) = *(buf0+0);"""
    with pytest.raises(RuntimeError, match=r"race, read after write: .*thread 1 reads .*which thread 0 accessed"):
        run(TWO, body, floats(64), floats(64), threads=64)


def test_two_threads_that_write_one_place_are_found() -> None:
    body = f"  {SHARED}float buf0[32];\n  *(buf0+lid.x/2) = 1.0f;"
    with pytest.raises(RuntimeError, match="race, write after write"):
        run(TWO, body, floats(64), floats(64), threads=64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"if (lid.x < 16) {{ {BARRIER} }}", "divergent barrier.*thread 0 is at a barrier.*thread 16 at its end"),
        (f"if (lid.x < 32) {{ {BARRIER} }}", "divergent barrier.*thread 32 at its end"),
        (f"if (lid.x < 16) {{\n{BARRIER}\n}} else {{\n{BARRIER}\n}}", "divergent barrier.*line 6,.*line 8,"),
        (f"for (int i = 0; i < 1+(lid.x&1); i++) {{ {BARRIER} }}", "divergent barrier"),
        ("if (lid.x < 16) { *(data0_64+lid.x) = simd_shuffle_xor(1.0f,1); }", "divergent simdgroup.*a shuffle"),
    ],
)
def test_threads_that_do_not_meet_are_found(body: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(TWO, f"\n  {body}", floats(64), floats(64), threads=64)


def test_a_shuffle_among_fewer_than_32_threads_is_found() -> None:
    with pytest.raises(RuntimeError, match=r"partial simdgroup.*16 threads"):
        run(TWO, "  *(data0_64+lid.x) = simd_sum(1.0f);", floats(64), floats(64), threads=48)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("*(data0_64+lid.x) = *(data1_64+lid.x+1);", "thread 63 reads 4 bytes at byte 256 of data1_64, which has 256"),
        ("*(data0_64+lid.x+1) = 1.0f;", "thread 63 writes 4 bytes at byte 256 of data0_64"),
        ("*(data0_64+(int)(lid.x)-3) = 1.0f;", "thread 0 writes 4 bytes at byte -12 of data0_64"),
        ("*((device float4*)((data0_64+lid.x*4))) = float4(1.0f,1.0f,1.0f,1.0f);", "thread 16 writes 1?[48]"),
        (f"{SHARED}float buf0[64];\n  *(buf0+lid.x+1) = 1.0f;", "outside threadgroup memory: .*thread 63 writes"),
        (f"{SHARED}float buf0[64];\n  *(data0_64+lid.x) = *(buf0+lid.x);", "unwritten threadgroup memory"),
    ],
)
def test_an_access_outside_is_found(body: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(TWO, f"  {body}", floats(64), floats(64), threads=64)


def test_a_thread_that_reads_what_another_threadgroup_wrote_is_found_where_it_is_watched(simulator: Settings) -> None:
    body = "  *(data0_64+gid.x*32+lid.x) = *(data0_64+((gid.x*32+lid.x+32)&63))+1.0f;"
    run(TWO, body, floats(64), floats(64), groups=2)
    with watching_device_memory(simulator), pytest.raises(RuntimeError, match=r"race in device memory.*reads data0_64"):
        for _ in range(2):  # threadgroups run in both orders, by turns: one shows it
            run(TWO, body, floats(64), floats(64), groups=2)
    with watching_device_memory(simulator):
        for _ in range(2):
            run(TWO, "  *(data0_64+gid.x*32+lid.x) += 1.0f;", floats(64), floats(64), groups=2)


def test_33_kib_of_threadgroup_memory_are_refused() -> None:
    body = f"  {SHARED}float buf0[%d];\n  *(buf0+lid.x) = 1.0f;\n  *(data0_64+lid.x) = *(buf0+lid.x);"
    run(TWO, body % (32 << 8), floats(64), floats(64))
    with pytest.raises(RuntimeError, match=r"size \(33792\) exceeds the maximum threadgroup memory allowed \(32768\)"):
        run(TWO, body % (33 << 8), floats(64), floats(64))


@pytest.mark.parametrize("count", [MAX_BUFFERS, MAX_BUFFERS + 1])
def test_32_arguments_are_refused_and_31_are_not(count: int) -> None:
    from tinygrad.device import CompileError

    params = ", ".join(f"device float* data{i}_32" for i in range(count))
    arrays = [floats() for _ in range(count)]
    if count > MAX_BUFFERS:
        with pytest.raises(CompileError, match="32 buffer arguments, but there are 31 places"):
            run(params, "  *(data0_32+lid.x) = *(data31_32+lid.x);", *arrays)
    else:
        out, *_ = run(params, "  *(data0_32+lid.x) = *(data30_32+lid.x)+1.0f;", *arrays)
        np.testing.assert_array_equal(out, arrays[-1] + 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("double x = 1.0; *(data0_64+lid.x) = (float)(x);", "type 'double' is not in Metal"),
        ("half8 x;", "vector type 'half8' is not in Metal"),
        ("float16 x;", "vector type 'float16' is not in Metal"),
        ("unsigned_char4 x;", "type 'unsigned_char4' is not in Metal"),
    ],
)
def test_types_that_metal_has_not_are_refused(line: str, message: str) -> None:
    from tinygrad.device import CompileError

    with pytest.raises(CompileError, match=message):
        run(TWO, f"  {line}", floats(64), floats(64))


def test_more_than_1024_threads_are_refused() -> None:
    with pytest.raises(RuntimeError, match="bigger than 1024"):
        run(TWO, "  *(data0_64+0) = 1.0f;", floats(64), floats(64), threads=1056)


def test_a_function_that_the_simulator_lacks_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"clang refuses tested:(.|\n)*simd_prefix_exclusive_sum"):
        run(TWO, "  *(data0_64+lid.x) = simd_prefix_exclusive_sum(1.0f);", floats(64), floats(64))


@pytest.mark.parametrize(
    "source", ["int x;", "kernel void f(texture2d<float> t) {\n}", "kernel void f(uint i [[x]]) {}"]
)
def test_sources_of_other_kinds_are_refused(source: str) -> None:
    with pytest.raises(MslError):
        read_kernel(source)


def test_fibers_switch_by_the_c_library_too(tmp_path: Path) -> None:
    """What is used where there is no assembler for the processor."""
    script = f"""
import tests.metal.simulator.native as native
from tests.metal.simulator.msl import read_kernel
native.RUNTIME_FLAGS += " -DSIM_UCONTEXT"
from pathlib import Path
from tests.metal.launching import make_source
import ctypes
memory = (ctypes.c_float * 64)(*range(64))
kernel = read_kernel(make_source("device float* data0_64, device float* data1_64", '''{NEIGHBOR % (BARRIER, 33)}'''))
base = ctypes.addressof(memory)
out = (ctypes.c_float * 64)()
arguments = [native.Argument(ctypes.addressof(out), 256), native.Argument(base, 256)]
native.Natives(Path({str(tmp_path)!r})).run(kernel, arguments, (2, 1, 1), (64, 1, 1))
assert list(out) == [i ^ 33 for i in range(64)], list(out)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
