"""The subject of a measurement: a model's files, or a shape with random weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.rows import Machine
from tinyvllm.bench.shapes import find_shape
from tinyvllm.config import EngineConfig, ModelConfig, ModelFiles
from tinyvllm.engine.heap import collect_start
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.cost import weight_facts
from tinyvllm.execution.runner import ModelRunner, Progress, load_random_runner, load_runner
from tinyvllm.storage.model_config import read_model_config


@dataclass(frozen=True)
class Subject:
    """`files` is None for random weights; `kind` is their format: float16, Q4_0, ..."""

    name: str
    model_config: ModelConfig
    files: ModelFiles | None = None
    kind: str = ""

    @classmethod
    def of_files(cls, files: ModelFiles) -> Subject:
        """Raises ModelError if the files cannot be run."""
        return cls(files.name, read_model_config(files), files=files)

    @classmethod
    def of_shape(cls, shape: str, kind: str, num_layers: int | None = None) -> Subject:
        """A shape of SHAPES, with only its first layers if `num_layers` is given."""
        model_config = find_shape(shape)
        if num_layers is None:
            return cls(model_config.name, model_config, kind=kind)
        if not 1 <= num_layers <= model_config.num_layers:
            raise TinyvllmError(f"--layers is {num_layers}: give 1 to {model_config.num_layers} for {shape}")
        name = f"{model_config.name}/{num_layers}-layers"
        return cls(name, dataclasses.replace(model_config, num_layers=num_layers), kind=kind)

    def open(self, config: EngineConfig, progress: Progress) -> ModelRunner:
        """A runner without captured graphs; the caller closes it."""
        if self.files is not None:
            return load_runner(self.files, config, progress)
        return load_random_runner(self.model_config, self.kind, config, progress)

    def load(self, config: EngineConfig, progress: Progress) -> ModelRunner:
        """A warm runner; the caller closes it."""
        runner = self.open(config, progress)
        try:
            runner.warm_up(progress)
        except BaseException:
            runner.close()
            raise
        collect_start(runner.num_captures)
        return runner

    def describe(self, runner: ModelRunner, bandwidth_gbps: float | None, seed: int) -> Machine:
        """The facts that all rows of a run share."""
        weights = weight_facts(runner.model)
        return Machine(
            model=self.name,
            dtype=weights.dtype,
            num_params=weights.num_params,
            model_bytes=weights.nbytes,
            device=runner.device,
            bandwidth_gbps=bandwidth_gbps,
            environment=describe_environment(seed),
            settings=_settings(runner),
        )


def _settings(runner: ModelRunner) -> dict[str, Any]:
    """The settings that a speed depends on, as the runner resolved them."""
    capacity, device = runner.capacity, runner.backend.device
    return {
        "max_num_batched_tokens": capacity.max_num_batched_tokens,
        "block_size": capacity.block_size,
        "kv_cache_dtype": runner.pool.formats.name,
        "cpu_cores": len(device.cores) or None,
        "max_in_flight": runner.max_in_flight,
        "capture": runner.captures.capture,
        "is_tuned": runner.is_tuned,
    }
