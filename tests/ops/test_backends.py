"""The choice of a backend, and of its numbers' formats."""

from __future__ import annotations

from unittest import mock

import pytest

from tinyvllm.config import EngineConfig, LayerKind
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.errors import DeviceError, TinyvllmError, UnsupportedModelError
from tinyvllm.ops import backends
from tinyvllm.ops.gpu import fused

LAYERS = [LayerKind(4, 2, 64)]


def chosen_dtype(dtype: str, stored: str, *, overflows_float16: bool) -> str:
    device = DeviceHandle("CUDA", has_threads=True, is_unified=False)
    with mock.patch.object(backends, "lanes_of"), mock.patch.object(fused, "FusedGpuBackend") as made:
        backends.make_backend(device, dtype, stored, LAYERS, dequantize=False, overflows_float16=overflows_float16)
    return str(made.call_args.args[1])


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_a_model_that_overflows_float16_gets_bfloat16(stored: str) -> None:
    assert chosen_dtype("auto", stored, overflows_float16=True) == "bfloat16"
    assert chosen_dtype("float32", stored, overflows_float16=True) == "float32"
    assert chosen_dtype("auto", stored, overflows_float16=False) == ("bfloat16" if stored == "bfloat16" else "float16")


def test_float16_is_refused_where_it_overflows() -> None:
    with pytest.raises(UnsupportedModelError, match=r"--dtype is 'float16'.*choose auto, bfloat16 or float32"):
        chosen_dtype("float16", "float16", overflows_float16=True)
    assert chosen_dtype("float16", "float16", overflows_float16=False) == "float16"


def test_activation_bits_are_refused_where_nothing_is_rounded() -> None:
    device = DeviceHandle("CUDA", has_threads=True, is_unified=False)
    with pytest.raises(DeviceError, match=r"--activation-bits is 8, but only x86 CPUs .* not CUDA here: leave it out"):
        backends.make_backend(device, "auto", "float16", LAYERS, dequantize=False, activation_bits=8)
    with pytest.raises(TinyvllmError, match=r"--activation-bits is 4: choose 16 or 8"):
        EngineConfig("tiny", activation_bits=4)
    with pytest.raises(TinyvllmError, match=r"--activation-bits is 8: leave it out, or --dtype float32"):
        EngineConfig("tiny", activation_bits=8, dtype="float32")
    with pytest.raises(TinyvllmError, match=r"--activation-bits is 8: leave it out, or --dequantize"):
        EngineConfig("tiny", activation_bits=8, dequantize=True)
