"""docs/MODELS.md: its tables are current, and it names every family and every target of `quantize`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tinyvllm.bench.model_tables import MACHINES, MODELS, SPARSE_AND_HYBRID, kv_bytes, num_active, num_weights
from tinyvllm.bench.shapes import SHAPES
from tinyvllm.convert.gguf_metadata import ARCHITECTURES
from tinyvllm.convert.hf_files import FAMILIES
from tinyvllm.convert.targets import KNOWN
from tinyvllm.profiling.chips import CHIPS
from tinyvllm.storage.families import KNOWN_ARCHITECTURES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "MODELS.md").read_text(encoding="utf-8")


def test_the_tables_are_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "models_table.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python scripts/models_table.py"


def test_every_chip_has_a_row() -> None:
    assert {machine.chip.name for machine in MACHINES} - {"laptop CPU"} == set(CHIPS)


def test_the_page_names_every_family_and_target() -> None:
    missing = [name for name in (*KNOWN_ARCHITECTURES, *ARCHITECTURES, *FAMILIES) if f"`{name}`" not in PAGE]
    missing += [name for name in KNOWN if f"`{name}`" not in PAGE and f"`-{name.rpartition('-')[2]}`" not in PAGE]
    assert missing == []


def test_counts_are_those_of_the_models_cards() -> None:
    billions = {
        "llama-3.2-1b": 1.24,
        "phi-4-mini": 3.84,
        "qwen3-4b": 4.02,
        "qwen2.5-7b": 7.62,
        "llama-3.1-8b": 8.03,
        "qwen3-8b": 8.19,
        "mistral-small-24b": 23.57,
        "qwen2.5-32b": 32.76,
        "llama-3.1-70b": 70.55,
    }
    for name, count in billions.items():
        assert abs(num_weights(SHAPES[name]) / 1e9 - count) < 0.01, name
    assert set(billions) <= set(MODELS)


def test_active_weights_are_those_of_the_models_cards() -> None:
    billions = {"qwen3-30b-a3b": 3.3, "mixtral-8x7b": 12.9}
    for name, count in billions.items():
        assert abs(num_active(SHAPES[name]) / 1e9 - count) < 0.1, name
    assert set(billions) <= set(SPARSE_AND_HYBRID)
    assert num_active(SHAPES["qwen3-8b"]) == num_weights(SHAPES["qwen3-8b"])


def test_a_window_bounds_the_cache() -> None:
    gemma = SHAPES["gemma-3-4b"]
    full = sum(4 * kind.kv_size for kind in gemma.layers if kind.window is None)
    assert kv_bytes(gemma, 40_000) - kv_bytes(gemma, 30_000) == 10_000 * full
