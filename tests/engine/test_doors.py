from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

import tinyvllm


def test_importing_the_package_starts_nothing() -> None:
    program = (
        "import sys, tinyvllm; tinyvllm.EngineConfig; tinyvllm.SamplingParams; "
        "print([m for m in ('tinygrad', 'numpy', 'tokenizers', 'rich', 'tinyvllm.engine') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_engine_room_does_not_load_the_device() -> None:
    program = (
        "import sys; from tinyvllm import LLM; import tinyvllm.engine.async_engine; print('tinygrad' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_doors_are_named() -> None:
    assert all(hasattr(tinyvllm, name) for name in tinyvllm.__all__)
    named = "it has LLM, EngineConfig, LoRARequest, SamplingParams"
    with pytest.raises(AttributeError, match=f"no attribute 'Engine': {named}"):
        tinyvllm.Engine  # noqa: B018


@pytest.mark.parametrize(("installed", "expected"), [("1.2.3", "1.2.3"), (None, "0+unknown")])
def test_the_version_is_the_installed_packages(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, expected: str
) -> None:
    def version(name: str) -> str:
        assert name == "tinyvllm"
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.delitem(vars(tinyvllm), "__version__", raising=False)
    assert tinyvllm.__version__ == expected
    monkeypatch.delitem(vars(tinyvllm), "__version__")
