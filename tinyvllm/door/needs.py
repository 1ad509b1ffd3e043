"""How much memory a model needs and its device has, as found by the process that is going to load it.

As in `tinyvllm models --check`, only the headers of the files are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from tinyvllm.config import DEVICE_VARIABLE, EngineConfig
from tinyvllm.door.policy import Need
from tinyvllm.errors import TinyvllmError
from tinyvllm.server.process import path_flags

if TYPE_CHECKING:
    from tinyvllm.execution.capacity import DraftMemory

MAX_UNIFIED_SHARE = 0.9  # of the free memory: an engine refuses more on a device that shares the host's memory

Examine = Callable[[EngineConfig], Need]


def examine(config: EngineConfig) -> Need:
    """What the model needs. Raises TinyvllmError if it cannot be run. Opens the device, on whose thread it must run."""
    from tinyvllm.device.kinds import kind_of
    from tinyvllm.execution.limits import fit_limits, limits_of_kind
    from tinyvllm.execution.model_check import default_device, examine_files, least_memory
    from tinyvllm.storage.resolve import resolve_model

    device = (os.environ.get(DEVICE_VARIABLE) or default_device()).upper()
    kind = kind_of(device)
    kind.check()
    free = kind.free_memory(device)
    with _quietly():  # loading logs the same again
        report = examine_files(resolve_model(config.model), device, config.planned_kv)
    least = least_memory(report, config, fit_limits(config, limits_of_kind(device, free)), device)
    draft = _draft_memory(config)
    return Need(
        device=device,
        weights=least.weights + draft.fixed_bytes,
        scratch=least.scratch,
        kv=least.kv + least.context * draft.bytes_per_token,
        context=least.context,
        free=free,
        share=config.gpu_memory_utilization or kind.default_share,
        max_share=MAX_UNIFIED_SHARE if kind.is_unified else 1.0,
        is_total=kind.name == "METAL",  # which says what it recommends, whoever uses it
    )


def _draft_memory(config: EngineConfig) -> DraftMemory:
    """What the draft model takes that `config` asks for; nothing without one."""
    from tinyvllm.execution.capacity import NO_DRAFT
    from tinyvllm.execution.draft_model import measure_draft
    from tinyvllm.storage.resolve import resolve_model

    wanted = config.speculative_config
    if wanted is None or wanted.model is None:
        return NO_DRAFT
    with _quietly():
        return measure_draft(resolve_model(wanted.model), config)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def examine_in_process(config: EngineConfig) -> Need:
    """`examine` in a process that ends at once, so that this one keeps neither tinygrad nor the device."""
    code = "from tinyvllm.door import needs; needs.main()"
    command = [sys.executable, *path_flags(), "-c", code]
    found = subprocess.run(command, input=msgspec.json.encode(config), capture_output=True, check=False)
    if found.returncode:
        lines = found.stderr.decode(errors="replace").strip().splitlines()
        raise TinyvllmError(lines[-1] if lines else f"it ended with exit code {found.returncode}")
    return msgspec.json.decode(found.stdout, type=Need)


def main() -> None:
    """Read settings, print needs."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    try:
        need = examine(config)
    except TinyvllmError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from error
    sys.stdout.buffer.write(msgspec.json.encode(need))


def within(config: EngineConfig, num_bytes: int, need: Need) -> EngineConfig:
    """The settings that make an engine take `num_bytes` of the free memory."""
    share = max(1e-6, min(need.max_share, num_bytes / max(1, need.free)))
    return dataclasses.replace(config, gpu_memory_utilization=share)
