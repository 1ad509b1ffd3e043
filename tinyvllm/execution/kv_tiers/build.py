"""Make the tiers of a model's pool."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from tinyvllm.config import Capacity, EngineConfig, ModelFiles
from tinyvllm.device.block_copies import Plane, planes_of
from tinyvllm.device.host_memory import available_bytes
from tinyvllm.errors import CapacityError
from tinyvllm.execution.kv_tiers.disk_tier import DiskTier
from tinyvllm.execution.kv_tiers.files import VERSION
from tinyvllm.execution.kv_tiers.host_tier import HostTier, divide_rows
from tinyvllm.execution.kv_tiers.tiers import KvTiers
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.execution.step_code import model_digest, sources_digest
from tinyvllm.model.registry import Model
from tinyvllm.ops.backend import Backend, KVPool
from tinyvllm.scheduling.tiers import STATE
from tinyvllm.storage.identity import weights_digest

logger = logging.getLogger(__name__)

TRANSIT_BYTES = 1 << 30  # of host memory that blocks pass through on their way to and from disk, without a host tier
MAX_QUEUED_BYTES = 1 << 30  # of blocks that wait to be written to disk
GIB = 1 << 30


def make_tiers(config: EngineConfig, runner: ModelRunner, files: ModelFiles) -> KvTiers | None:
    """The tiers of a runner's pool that the settings ask for, which are closed with it; None: none. files: the model's.

    Raises CapacityError for more host memory than there is, and DeviceError where blocks cannot be copied."""
    if not config.has_kv_tiers:
        return None
    model, backend, pool, capacity = runner.model, runner.backend, runner.pool, runner.capacity
    device = backend.device
    planes = _planes(model, pool)
    sizes = {kind: sum(plane.nbytes for plane in of_kind) for kind, of_kind in planes.items()}
    copies = {kind: device.block_copies(of_kind) for kind, of_kind in planes.items()}
    keeps_evicted = bool(config.kv_offloading_size)
    host_bytes = int((config.kv_offloading_size or 0) * GIB) or TRANSIT_BYTES
    counts = divide_rows(host_bytes, sizes, _weights(capacity, sizes))
    needed, available = sum(counts[kind] * sizes[kind] for kind in sizes), available_bytes()
    if needed > max(host_bytes, available):
        raise CapacityError(
            f"--kv-offloading-size of {host_bytes / GIB:.3f} GiB cannot hold a block of each kind, which takes "
            f"{needed / GIB:.3f} GiB: give more"
        )
    if needed > available and keeps_evicted:
        raise CapacityError(
            f"--kv-offloading-size is {host_bytes / GIB:g} GiB, but {available / GIB:.1f} GiB of memory are free: give "
            "less"
        )
    host = HostTier(sizes, counts, device.host_rows, ahead=device.pins_host_memory)
    disk = None
    weights = None if config.kv_disk_cache is None else _weights_digest(files)
    if config.kv_disk_cache is not None and weights is not None:
        digest = _digest(model, backend, capacity, planes, weights)
        max_queued_bytes = min(MAX_QUEUED_BYTES, host_bytes // 2)
        disk = DiskTier(Path(config.kv_disk_cache), digest, config.kv_disk_bytes, max_queued_bytes)
    _log(keeps_evicted, host, disk, capacity, sizes)
    tiers = KvTiers(copies, sizes, host, disk, keeps_evicted=keeps_evicted, wait=device.wait)
    runner.closed_with.append(tiers)
    return tiers


def _weights_digest(files: ModelFiles) -> bytes | None:
    """What identifies the weights; None if their files cannot be read any more."""
    try:
        return weights_digest(files)
    except OSError as error:
        logger.warning("KV blocks are not kept on disk: the weights cannot be identified: %s", error)
        return None


def _planes(model: Model, pool: KVPool) -> dict[int, list[Plane]]:
    """By kind: the tensors of a group's layers, and those of recurrent states."""
    planes: dict[int, list[Plane]] = {}
    for number, group in enumerate(model.pool_groups):
        planes[number] = [
            plane
            for layer in sorted(group.shapes)
            for plane in planes_of(pool.tensors_of(layer), pool.num_blocks[layer])
        ]
    if pool.num_state_slots:
        planes[STATE] = planes_of(pool.state_tensors, pool.num_state_slots)
    return {kind: of_kind for kind, of_kind in planes.items() if of_kind}


def _weights(capacity: Capacity, sizes: Mapping[int, int]) -> dict[int, int]:
    """Blocks of each kind that the longest sequence needs, so that host memory holds as many prefixes of each."""
    num_blocks = math.ceil(capacity.max_model_len / capacity.block_size)
    weights = {STATE: 2 + num_blocks // capacity.checkpoint_interval}
    for number, group in enumerate(capacity.groups):
        in_window = num_blocks if group.window is None else 1 + math.ceil(group.window / capacity.block_size)
        weights[number] = min(num_blocks, in_window)
    return {kind: weights[kind] for kind in sizes}


def _digest(
    model: Model, backend: Backend, capacity: Capacity, planes: Mapping[int, list[Plane]], weights: bytes
) -> bytes:
    """16 bytes: a hash of all that a block's bytes depend on besides its tokens. This package's code is a part of it: a
    new version may compute other keys, or lay them out differently."""
    layout = [
        (kind, [(str(plane.buffer.dtype), plane.nbytes) for plane in of_kind]) for kind, of_kind in planes.items()
    ]
    config = model.config
    # longrope's factors for long contexts change all keys
    is_stretched = capacity.max_model_len > config.usual_context
    facts = (
        VERSION,
        sources_digest(),
        weights,
        model_digest(model, backend),
        layout,
        capacity.block_size,
        is_stretched,
    )
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def _log(
    keeps_evicted: bool, host: HostTier, disk: DiskTier | None, capacity: Capacity, sizes: Mapping[int, int]
) -> None:
    parts = []
    if keeps_evicted:
        tokens = host.num_rows_of(0) * capacity.block_size
        parts.append(f"up to {host.max_bytes / GIB:.2f} GiB in host memory ({tokens} tokens)")
    if disk is not None:
        parts.append(f"up to {disk.max_bytes / GIB:g} GiB on disk ({disk.used_bytes / GIB:.2f} used)")
    kinds = [f"{len(capacity.groups)} groups of layers"] if len(capacity.groups) > 1 else []
    kinds += ["checkpoints of recurrent states"] if STATE in sizes else []
    detail = f", with {' and '.join(kinds)}" if kinds else ""
    logger.info("KV blocks that fall out of the pool are kept: %s%s", " and ".join(parts) or "nowhere", detail)
