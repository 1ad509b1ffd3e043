"""The choice of a backend by device. The modules of the others are not imported, which would take half of the time."""

from __future__ import annotations

from collections.abc import Sequence

from tinygrad import UOp, dtypes

from tinyvllm.config import LayerKind
from tinyvllm.device.handle import DeviceHandle, has_dot_instructions
from tinyvllm.device.kinds import KINDS
from tinyvllm.errors import DeviceError, UnsupportedModelError
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.kernel.lanes import lanes_of


def import_kernels(is_cpu: bool) -> None:
    """Import the modules that a device's backend needs."""
    if is_cpu:
        import tinyvllm.ops.cpu.backend
        import tinyvllm.ops.cpu.unfused
    else:
        import tinyvllm.ops.gpu.fused  # noqa: F401


def practice_kernel() -> UOp:
    """A small kernel of a CPU: most rules that others need apply to it too."""
    from tinyvllm.ops.cpu.linear import rms_norm_kernel
    from tinyvllm.ops.cpu.product import NormSpec

    spec = NormSpec(num_tokens=4, num_cols=64, eps=1e-5)
    sizes = (spec.num_tokens * spec.num_cols, spec.num_tokens * spec.num_cols, spec.num_cols)
    return rms_norm_kernel(spec)(*[UOp.placeholder((size,), dtypes.float, slot) for slot, size in enumerate(sizes)])


def make_backend(
    device: DeviceHandle,
    dtype: str,
    stored: str,
    layers: Sequence[LayerKind],
    *,
    dequantize: bool,
    activation_bits: int | None = None,
    overflows_float16: bool = False,
    unfused: bool = False,
) -> Backend:
    """The backend for a device. `dtype`: "auto" or one of config.DTYPES; `stored`: the dtype of the checkpoint's dense
    matrices; `layers`: the kinds of the model's layers; `overflows_float16`: as in ModelConfig; `unfused`: with the
    general kernels where there are fused ones. A CPU's activations are always float32; its products round them to
    `activation_bits`, unless `dtype` is "float32". Raises DeviceError for a device without kernels, without fused ones
    to leave out, or without such products, and UnsupportedModelError for a dtype that the activations exceed."""
    if activation_bits is not None and not (device.is_cpu and has_dot_instructions()):
        raise DeviceError(
            f"--activation-bits is {activation_bits}, but only x86 CPUs round activations, not {device.name} here: "
            "leave it out"
        )
    if device.is_cpu:
        from tinyvllm.ops.cpu.backend import CpuBackend
        from tinyvllm.ops.cpu.unfused import UnfusedCpuBackend

        backend = UnfusedCpuBackend if unfused else CpuBackend
        own = None if dtype == "auto" else dtype
        return backend(
            device, own, layers, dequantize=dequantize, x_bits=None if dtype == "float32" else activation_bits or 16
        )
    if not device.kind.has_kernels:
        known = ", ".join(kind.name for kind in KINDS.values() if kind.has_kernels)
        raise DeviceError(f"device {device.name} has no kernels here: choose one of {known} with --device")
    if dtype == "auto":
        dtype = "bfloat16" if stored == "bfloat16" or overflows_float16 else "float16"
    if dtype == "float16" and overflows_float16:
        raise UnsupportedModelError(
            "--dtype is 'float16', but this model's activations exceed its range: choose auto, bfloat16 or float32"
        )
    from tinyvllm.ops.gpu.backend import GpuBackend
    from tinyvllm.ops.gpu.fused import FusedGpuBackend

    lanes = lanes_of(device.name)
    if lanes is None and unfused:
        raise DeviceError(
            f"device {device.name} has no fused kernels, so --unfused has nothing to compare: leave it out"
        )
    if lanes is None or unfused:  # OpenCL's are general
        return GpuBackend(device, dtype, dequantize=dequantize)
    return FusedGpuBackend(device, dtype, lanes, dequantize=dequantize)
