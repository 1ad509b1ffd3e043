"""How much one step may hold where nobody says so: what suits the device."""

from __future__ import annotations

from tinyvllm.config import EngineConfig, Limits
from tinyvllm.device.handle import DeviceHandle, open_device

BIG_BYTES = 40 << 30
# A step of more tokens computes prompts at a higher rate, and those who decode beside them wait longer: of these sizes
# it takes 0.27 s on two cores of a CPU (135M parameters) and some 40 ms on an H200 (1B). Sequences: as many as the
# device decodes at a rate that still grows (an H200: 72,000 tokens a second with 128, 91,000 with 256).
CPU = Limits(max_num_seqs=16, max_num_batched_tokens=256)
SHARED_GPU = Limits(max_num_seqs=16, max_num_batched_tokens=512)  # METAL, and OpenCL
CUDA = Limits(max_num_seqs=128, max_num_batched_tokens=2048)
BIG_CUDA = Limits(max_num_seqs=256, max_num_batched_tokens=8192)  # BIG_BYTES free


def resolve_limits(config: EngineConfig, device: DeviceHandle | None = None) -> Limits:
    """What the settings say, and the device's own limits where they say nothing: the one is fitted to the other where
    only one is given. `device`: None opens the default one. Raises DeviceError."""
    seqs, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if seqs is not None and tokens is not None:
        return Limits(seqs, tokens)
    own = device_limits(device or open_device())
    if seqs is not None:
        return Limits(seqs, max(seqs, own.max_num_batched_tokens))
    return Limits(min(own.max_num_seqs, tokens or own.max_num_seqs), tokens or own.max_num_batched_tokens)


def device_limits(device: DeviceHandle) -> Limits:
    if device.is_cpu:
        return CPU
    if device.is_unified:
        return SHARED_GPU
    return BIG_CUDA if device.free_memory() >= BIG_BYTES else CUDA
