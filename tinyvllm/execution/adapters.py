"""The adapters that an engine has loaded: their files, their matrices in host memory, and writing them to slots."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

    Host memory holds the matrices of at most `max_cpu` adapters: those of running requests, and the most recently used.
    Others are read from their files again, on a thread of the table's own, before a request may have a slot for one.
    """

    def __init__(self, sites: ModelAdapters, model: ModelConfig, max_rank: int, max_cpu: int) -> None:
        self._sites, self._model = sites, model
        self._max_rank, self._max_cpu = max_rank, max_cpu
        self._modules = sites.modules
        self._infos: dict[str, AdapterInfo] = {}  # by name
        self._paths: dict[str, Path] = {}  # by key, those unloaded while requests use them included
        self._stamps: dict[str, tuple[object, ...]] = {}  # by key, of the files when they were loaded
        self._weights: OrderedDict[str, AdapterWeights] = OrderedDict()  # by key, the least recently used first
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="tinyvllm-adapter-files")
        self._reading: tuple[str, Future[AdapterWeights]] | None = None  # a key, and what is read for it
        self._failures: dict[str, str] = {}  # by key, why it could not be read again

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

    def add(
        self, name: str, path: str, weights: AdapterWeights, *, replaces: bool = False, held: Collection[str] = ()
    ) -> AdapterInfo:
        """Make an adapter known by a name. held: keys of adapters whose matrices must stay in host memory. Raises
        RequestError if the name is taken and may not be replaced, or could not be read in a log."""
        if not name.isprintable() or name != name.strip():
            raise RequestError(
                f"adapter name {name!a} has characters that cannot be printed, or spaces around it: choose another",
                param="lora_name",
            )
        if "," in name:
            raise RequestError(
                f"adapter name {name!r} has a comma, with which metrics join names: choose another", param="lora_name"
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
        self._hold(info.key, weights, held)
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
        changed."""
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

    def fetch(self, key: str, held: Collection[str]) -> bool:
        """Whether an adapter's matrices are in host memory. If not, begins to read them, unless that has begun. Those
        of the `held` adapters stay there. What cannot be read is in `take_failures`."""
        if key in self._weights:
            self._weights.move_to_end(key)
            return True
        if self._reading is None or self._reading[0] != key:
            if self._reading is not None:  # for a request that was ended, or that another one has passed by priority
                self._reading[1].cancel()
            self._reading = key, self._reader.submit(self._read_again, key, self._paths[key])
        read = self._reading[1]
        if not read.done():
            return False
        self._reading = None
        try:
            weights = read.result()
        except Exception as error:
            self._failures[key] = str(error)
            return False
        self._hold(key, weights, held)
        return True

    def wait(self, timeout_s: float) -> None:
        """Wait until what is read has been read."""
        if self._reading is not None:
            wait([self._reading[1]], timeout_s)

    def take_failures(self) -> dict[str, str]:
        """Why adapters could not be read again, by key, since the last call."""
        failures, self._failures = self._failures, {}
        return failures

    def close(self) -> None:
        """End the thread that reads."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def write(self, write: SlotWrite) -> None:
        """Put an adapter whose matrices are in host memory into a slot. No step in flight may use the slot."""
        self._sites.write(write.slot, self._weights[write.adapter])

    def _read_again(self, key: str, path: Path) -> AdapterWeights:
        """The matrices of an adapter that was loaded from `path`. Raises ModelError."""
        weights = self.read(str(path))
        if key.rpartition(":")[2] != weights.digest:
            raise ModelError(f"the files of the adapter in {path} have changed since it was loaded: load it again")
        return weights

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

    def _hold(self, key: str, weights: AdapterWeights, held: Collection[str]) -> None:
        """Keep an adapter's matrices, in place of the least recently used that are not `held`."""
        self._weights[key] = weights
        self._weights.move_to_end(key)
        others = [other for other in self._weights if other not in held]
        for other in others[: max(0, len(self._weights) - self._max_cpu)]:
            del self._weights[other]
