"""The default limits of one step, by device."""

from __future__ import annotations

from tinyvllm.config import EngineConfig, Limits
from tinyvllm.device.handle import DeviceHandle, open_device
from tinyvllm.device.kinds import kind_of


def resolve_limits(config: EngineConfig, device: DeviceHandle | None = None) -> Limits:
    """The limits in the settings, or else the device's. If only one is set, the other is fitted to it. `device`: None
    opens the default one. Raises DeviceError."""
    seqs, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if seqs is not None and tokens is not None:
        return Limits(seqs, tokens)
    return fit_limits(config, device_limits(device or open_device()))


def fit_limits(config: EngineConfig, own: Limits) -> Limits:
    """The limits in the settings, or else `own`, the device's, fitted to each other."""
    seqs, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if seqs is not None and tokens is not None:
        return Limits(seqs, tokens)
    if seqs is not None:
        return Limits(seqs, max(seqs, own.max_num_batched_tokens))
    return Limits(min(own.max_num_seqs, tokens or own.max_num_seqs), tokens or own.max_num_batched_tokens)


def device_limits(device: DeviceHandle) -> Limits:
    return device.kind.step_limits(device.free_memory)


def limits_of_kind(name: str, free_bytes: int = 0) -> Limits:
    """The same for a device that is not here, with `free_bytes` of free memory."""
    return kind_of(name).step_limits(lambda: free_bytes)
