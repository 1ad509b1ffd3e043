"""Codes of quantized keys and values, computed by a kernel, against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import float8_e4m3fn
from tinygrad import UOp, dtypes

from tinyvllm.config import KV_FORMATS, KVFormats
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.kernel.body import F16, F32, I32, U32, Body, KernelFn, cached_kernel, empty, finish, run_kernel
from tinyvllm.ops.kernel.kv_format import (
    E4M3_UNIT,
    e4m3_code,
    e4m3_half,
    group_code,
    group_extreme,
    group_inverse,
    group_scale,
)
from tinyvllm.ops.kv_reference import dequantize, quantize

GROUP = 32


@cached_kernel
def quantize_kernel(name: str, count: int) -> KernelFn:
    """fn(codes (count,) int32, scales (count / 32,) float16, x): one code an element, not packed."""

    def kernel(codes: UOp, scales: UOp, x: UOp) -> UOp:
        group = Body().loop(count // GROUP)
        values = [x[group * GROUP + i].load() for i in range(GROUP)]
        form, extreme = KV_FORMATS[name], group_extreme(KV_FORMATS[name], values)
        inverse = group_inverse(form, extreme)
        stores = [codes[group * GROUP + i].store(group_code(form, v, inverse)) for i, v in enumerate(values)]
        done = UOp.group(*stores, scales[group].store(group_scale(form, extreme)))
        return finish(done.end(group), f"quantize_{name}_{count}")

    return kernel


@cached_kernel
def e4m3_kernel(count: int) -> KernelFn:
    """fn(codes (count,) uint32, decoded (count,) float32, x)."""

    def kernel(codes: UOp, decoded: UOp, x: UOp) -> UOp:
        i = Body().loop(count)
        code = e4m3_code(x[i].load())
        value = e4m3_half(code.cast(dtypes.uint8)).cast(F32) * E4M3_UNIT
        return finish(UOp.group(codes[i].store(code), decoded[i].store(value)).end(i), f"e4m3_{count}")

    return kernel


def groups(seed: int) -> np.ndarray:
    """Groups of many magnitudes, one of zeros, and one whose extremes are equal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, GROUP), np.float32) * np.float32(10.0) ** rng.integers(-5, 4, (64, 1))
    x[0], x[1, :2] = 0, (2000.0, -2000.0)
    return x.astype(np.float32)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_codes_and_scales_of_a_kernel_are_those_of_numpy(device: DeviceHandle, name: str) -> None:
    x, form = groups(seed=1), KV_FORMATS[name]
    outs = [empty(x.size, I32, device.name), empty(x.size // GROUP, F16, device.name)]
    codes, scales = run_kernel(quantize_kernel(name, x.size), outs, [device.upload(x)])
    expected, expected_scales = quantize(x, form)
    assert expected_scales is not None
    np.testing.assert_array_equal(scales.numpy().reshape(expected_scales.shape), expected_scales)
    got = codes.numpy().reshape(x.shape)
    if name == "q4_0":
        got = got[:, :16] | got[:, 16:] << 4
    np.testing.assert_array_equal(got.astype(np.uint8), expected)
    error = np.abs(dequantize(expected, expected_scales, form) - x)
    steps = np.abs(x).max(-1, keepdims=True) / {"q8_0": 127, "q4_0": 8}[name]
    assert (error <= steps * {"q8_0": 0.57, "q4_0": 1.01}[name] + 1e-5).all()  # half a step, and the scale's rounding
    assert error.mean() < 0.26 * steps.mean()


def test_e4m3_is_the_standard_s_and_saturates(device: DeviceHandle) -> None:
    every = np.arange(256, dtype=np.uint8).view(float8_e4m3fn).astype(np.float32)
    every = every[np.isfinite(every)]
    between = (every[:-1] + every[1:]) / 2  # ties, and next to them
    x = np.concatenate([every, between, between * np.float32(1.0001), [449, -1e9, np.inf, 1e-12]]).astype(np.float32)
    outs = [empty(x.size, U32, device.name), empty(x.size, F32, device.name)]
    codes, decoded = run_kernel(e4m3_kernel(x.size), outs, [device.upload(x)])
    expected, _ = quantize(x, KV_FORMATS["fp8_e4m3"])
    np.testing.assert_array_equal(codes.numpy().astype(np.uint8), expected)
    np.testing.assert_array_equal(decoded.numpy(), dequantize(expected, None, KV_FORMATS["fp8_e4m3"]))


def test_the_bytes_of_formats_include_their_scales() -> None:
    assert [KVFormats.of(name).num_bytes(128) for name in ("float16", "fp8", "q8_0", "q4_0")] == [512, 256, 272, 144]
    mixed = KVFormats.of("q8_0", "q4_0")
    assert mixed.num_bytes(128) == (272 + 144) // 2 and mixed.bytes_per_element == 0.8125
    assert mixed.name == "q8_0 keys, q4_0 values" and KVFormats.of("fp8").name == "fp8_e4m3"
