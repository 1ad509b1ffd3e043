"""Where the engines of one machine run: a GPU each, or a share of the CPU's cores each."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from tinyvllm.config import EngineConfig, usable_cores
from tinyvllm.errors import TinyvllmError

GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"
_DEFAULT_SHARES = {"METAL": 0.8, "CPU": 0.5}  # of free memory, for devices whose engines share it


@dataclasses.dataclass(frozen=True)
class Placement:
    """How each engine is started."""

    config: EngineConfig
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # additional variables
    cores: tuple[int, ...] | None = None  # that it may use; None: all


def place_engines(config: EngineConfig, num_engines: int, device: str | None) -> list[Placement]:
    """Give each of several engines a device of its own, or its share of the only one. device: tinygrad's, if given.

    Engine k gets the k-th CUDA device that this process sees. The CPU's cores are divided: an engine's threads wait for
    each other at every kernel, so that none of them may have to wait for a core. Raises TinyvllmError if
    CUDA_VISIBLE_DEVICES names fewer GPUs than there are engines.
    """
    if num_engines == 1:
        return [Placement(config)]
    kind = (device or default_device()).partition(":")[0]
    if kind not in _DEFAULT_SHARES:
        return [Placement(config, environment={GPUS_VARIABLE: gpu}) for gpu in _gpus(num_engines)]
    share = (config.gpu_memory_utilization or _DEFAULT_SHARES[kind]) / num_engines
    config = dataclasses.replace(config, gpu_memory_utilization=share)
    if kind != "CPU":
        return [Placement(config)] * num_engines
    cores = _core_numbers()[: usable_cores()]
    size = max(1, min(len(cores) // num_engines, config.cpu_cores or len(cores)))
    shares = [tuple(cores[(k * size + i) % len(cores)] for i in range(size)) for k in range(num_engines)]
    config = dataclasses.replace(config, cpu_cores=size)
    return [Placement(config, cores=share) for share in shares]


def _gpus(num_engines: int) -> list[str]:
    """A GPU for each engine, as CUDA_VISIBLE_DEVICES names it. It may name one twice, for two engines to share."""
    value = os.environ.get(GPUS_VARIABLE)
    if value is None:
        return [str(k) for k in range(num_engines)]
    visible = [name for part in value.split(",") if (name := part.strip())]
    if len(visible) < num_engines:
        raise TinyvllmError(
            f"{GPUS_VARIABLE}={value!r} names {len(visible)} GPUs, too few for {num_engines} engines: name one for "
            "each engine, unset the variable, or lower --data-parallel-size"
        )
    return visible[:num_engines]


def default_device() -> str:
    """The device that tinygrad takes if none is given, without importing it."""
    if sys.platform == "darwin":
        return "METAL"
    return "CUDA" if Path("/dev/nvidiactl").exists() else "CPU"


def _core_numbers() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
