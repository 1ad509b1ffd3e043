"""The adapters that an engine has loaded: their files, their matrices in host memory, and writing them to slots."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import numpy as np

from tinyvllm.config import ModelConfig
from tinyvllm.errors import ModelError, RequestError
from tinyvllm.model.adapters import ModelAdapters
from tinyvllm.model.weights.adapters import AdapterWeights, LowRank, read_adapter
from tinyvllm.scheduling.adapter_slots import AdapterInfo, SlotWrite
from tinyvllm.storage.adapter_config import stamp_of

logger = logging.getLogger(__name__)


class AdapterTable:
    """Owns the loaded adapters. `read` may be called on any thread, the others on the engine's only.

    Host memory holds the matrices of at most `max_cpu` adapters, the most recently used; others are read from their
    files again when they are written to a slot.
    """

    def __init__(self, sites: ModelAdapters, model: ModelConfig, max_rank: int, max_cpu: int) -> None:
        self._sites, self._model = sites, model
        self._max_rank, self._max_cpu = max_rank, max_cpu
        self._modules = sites.modules
        self._infos: dict[str, AdapterInfo] = {}  # by name
        self._paths: dict[str, Path] = {}  # by key, those unloaded while requests use them included
        self._stamps: dict[str, tuple[object, ...]] = {}  # by key, of the files when they were loaded
        self._weights: OrderedDict[str, AdapterWeights] = OrderedDict()  # by key, the least recently used first

    @property
    def device_bytes(self) -> int:
        """Of all slots."""
        return self._sites.nbytes

    @property
    def infos(self) -> list[AdapterInfo]:
        """In the order in which they were loaded."""
        return list(self._infos.values())

    def read(self, path: str) -> AdapterWeights:
        """An adapter's matrices, from the directory `path`. Raises ModelError."""
        return read_adapter(Path(path).expanduser(), self._modules, self._model, self._max_rank)

    def add(self, name: str, path: str, weights: AdapterWeights, *, replaces: bool = False) -> AdapterInfo:
        """Make an adapter known by a name. Raises RequestError if the name is taken and may not be replaced, or could
        not be read in a log."""
        if not name.isprintable() or name != name.strip():
            raise RequestError(
                f"adapter name {name!a} has characters that cannot be printed, or spaces around it: choose another",
                param="lora_name",
            )
        taken = self._infos.get(name)
        if taken is not None and not replaces and taken.digest != weights.digest:
            raise RequestError(
                f"adapter {name!r} is already loaded, from {taken.path}: unload it first, or give load_inplace",
                param="lora_name",
            )
        info = AdapterInfo(name, path, weights.digest, weights.rank, weights.base_model, time.time())
        self._infos[name] = info
        self._paths[info.key] = Path(path).expanduser()
        self._stamps[info.key] = stamp_of(self._paths[info.key])
        self._hold(info.key, weights)
        logger.info("loaded adapter %s from %s: rank %d, %.1f MB", name, path, weights.rank, weights.nbytes / 1e6)
        return info

    def remove(self, name: str) -> AdapterInfo:
        """Forget a name. Requests that run with the adapter end with it. Raises RequestError if it is unknown."""
        info = self._infos.pop(name, None)
        if info is None:
            raise RequestError(f"adapter {name!r} is not loaded", param="lora_name", code="not_found")
        logger.info("unloaded adapter %s", name)
        return info

    def forget_unused(self, used: Collection[str]) -> list[str]:
        """Drop the adapters without a name, except the `used` ones; returns their keys."""
        named = {info.key for info in self._infos.values()}
        gone = [key for key in self._paths if key not in named and key not in used]
        for key in gone:
            del self._paths[key], self._stamps[key]
            self._weights.pop(key, None)
        return gone

    def require(self, key: str) -> None:
        """Raise RequestError if no loaded adapter has this key, or if it would have to be read again and its files have
        changed: that would fail the step, and end all of its requests."""
        if key not in self._paths:
            raise RequestError(
                f"adapter {key.rpartition(':')[0]!r} is not loaded, or other files were loaded by this name since: "
                "list the models, and try again",
                param="model",
                code="model_not_found",
            )
        path = self._paths[key]
        if key not in self._weights and stamp_of(path) != self._stamps[key]:
            raise RequestError(
                f"the files of the adapter in {path} have changed since it was loaded, or are gone: load it again",
                param="model",
            )

    def write(self, write: SlotWrite) -> None:
        """Put an adapter into a slot. No step in flight may use the slot. Raises ModelError if it has to be read again,
        and cannot be."""
        weights = self._weights.get(write.adapter)
        if weights is None:
            path = self._paths[write.adapter]
            weights = self.read(str(path))
            if write.adapter != f"{write.adapter.rpartition(':')[0]}:{weights.digest}":
                raise ModelError(f"the files of the adapter in {path} have changed since it was loaded: load it again")
        self._hold(write.adapter, weights)
        self._sites.write(write.slot, weights)

    def fill_slots(self, seed: int) -> None:
        """Put random adapters of the largest rank into all slots, for measurements."""
        rng = np.random.default_rng(seed)
        for slot in range(1, self._sites.num_slots + 1):
            modules = {}
            for name, module in self._modules.items():
                a = rng.random((self._max_rank, module.num_cols), np.float32) - 0.5
                b = rng.random((module.num_rows, self._max_rank), np.float32) - 0.5
                modules[name] = LowRank(a / module.num_cols, b)
            self._sites.write(slot, AdapterWeights("", self._max_rank, modules, ""))

    def _hold(self, key: str, weights: AdapterWeights) -> None:
        self._weights[key] = weights
        self._weights.move_to_end(key)
        while len(self._weights) > self._max_cpu:
            self._weights.popitem(last=False)
