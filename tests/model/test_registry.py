"""Families by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
from tests.builders import write_tiny_hf_llama
from tinyvllm.config import ModelFiles
from tinyvllm.device.handle import open_device
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.llama import Llama
from tinyvllm.model.qwen3 import Qwen3
from tinyvllm.model.registry import FAMILIES, make_model
from tinyvllm.model.weights.checkpoint import open_checkpoint
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.storage.families import KNOWN_ARCHITECTURES
from tinyvllm.storage.model_config import read_model_config


def test_a_known_architecture_becomes_its_family(tiny_hf_files: ModelFiles) -> None:
    config = read_model_config(tiny_hf_files)
    checkpoint = open_checkpoint(tiny_hf_files, config)
    model = make_model(config, checkpoint, CpuBackend(open_device(), None), 16, lambda done, total: None)
    assert isinstance(model, Llama)
    assert model.logit_stride % 32 == 0
    assert model.logit_stride >= config.vocab_size


def test_qwen3_is_a_family_of_its_own(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path, family="qwen3")
    config = read_model_config(files)
    backend = CpuBackend(open_device(), None)
    model = make_model(config, open_checkpoint(files, config), backend, 16, lambda done, total: None)
    assert (config.architecture, type(model)) == ("qwen3", Qwen3)
    assert KNOWN_ARCHITECTURES.keys() == FAMILIES.keys()


def test_an_unknown_architecture_lists_the_known(tiny_hf_files: ModelFiles) -> None:
    config = replace(read_model_config(tiny_hf_files), architecture="mamba")
    checkpoint = open_checkpoint(tiny_hf_files, config)
    with pytest.raises(
        UnsupportedModelError, match="architecture 'mamba' is not known; known: " + ", ".join(sorted(FAMILIES))
    ):
        make_model(config, checkpoint, CpuBackend(open_device(), None), 16, lambda done, total: None)
