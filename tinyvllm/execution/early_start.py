"""What a start begins before it imports tinygrad: waking the device, and the processes that trace and compile."""

from __future__ import annotations

import contextlib
import os
import threading

import tinyvllm.device  # noqa: F401  (makes tinygrad's settings, which these processes read too)
from tinyvllm.config import EngineConfig
from tinyvllm.device.compile_workers import BEGIN_WORKER, end_unused, prepare_early
from tinyvllm.device.environment import num_processes
from tinyvllm.device.kinds import kind_of
from tinyvllm.device.private_folder import default_root

# layers times buckets from which on other processes help a start to trace: each takes a second to begin, in which this
# one traces 30 to 60 layers
MANY_LAYERS = 32
LEAST_BUCKETS = 2  # that every start captures
PREPARE = "tinyvllm.execution.tracing:prepare_there"


def begin_early(config: EngineConfig, num_layers: int) -> None:
    """Wake the device. Start the processes if they are certain to be needed, because no step is kept from an earlier
    start: they import what they need while this process does. `prepare_tracing` starts them if it turns out later."""
    kind = os.environ["DEV"].split(":")[0]
    with contextlib.suppress(RuntimeError):  # no more threads: opening the device does it all
        threading.Thread(target=kind_of(kind).wake, name="tinyvllm-wake", daemon=True).start()
    if config.capture != "replay" or num_processes() < 2 or num_layers * LEAST_BUCKETS < MANY_LAYERS:
        return
    if not (config.compile_cache and any(default_root().glob(f"{kind}*/step-*"))):
        prepare_early(BEGIN_WORKER, PREPARE, kind == "CPU")


def end_early() -> None:
    """For a load that has failed: end the processes, unless jobs have come since."""
    end_unused(BEGIN_WORKER)
