"""What the engine relies on in every kind of device."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

from tinyvllm.device import kinds
from tinyvllm.device.environment import default_device
from tinyvllm.device.handle import DeviceHandle, open_device
from tinyvllm.device.kinds import KINDS, DeviceKind, kind_of
from tinyvllm.errors import DeviceError


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_is_found_by_its_devices_names(kind: DeviceKind) -> None:
    assert kind_of(kind.name) is kind_of(f"{kind.name}:1") is kind_of(kind.name.lower()) is kind
    assert KINDS[kind.name] is kind


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_its_share_leaves_the_computer_what_it_shares(kind: DeviceKind) -> None:
    handle = DeviceHandle(kind.name, kind.name != "CPU", kind.is_unified)
    assert 0 < kind.default_share <= handle.max_share <= 1


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_step_holds_more_where_more_memory_is_free(kind: DeviceKind) -> None:
    less, more = kind.step_limits(lambda: 1 << 30), kind.step_limits(lambda: 1000 << 30)
    assert 0 < less.max_num_seqs <= less.max_num_batched_tokens
    assert less.max_num_seqs <= more.max_num_seqs and less.max_num_batched_tokens <= more.max_num_batched_tokens


def test_the_last_kind_is_always_there() -> None:
    assert list(KINDS)[-1] == "CPU" and KINDS["CPU"].is_default()
    assert default_device() in KINDS


def test_an_unknown_kind_is_plain_and_has_no_kernels() -> None:
    kind = kind_of("NPU:3")
    assert (kind.name, kind.has_kernels, kind.program_limits, dict(kind.settings)) == ("NPU", False, None, {})


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(DeviceError, match="'no-such-compiler' is not on the PATH: unset CC, or set CC=clang"):
        open_device()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeviceError, match="'no-such-compiler' is not on the PATH: install clang"):
        open_device()


@pytest.mark.parametrize("program", ['#!/bin/sh\ncase "$*" in *--target*) exit 1;; esac\n', "no program"])
def test_another_compiler_than_clang_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """As where gcc alone is installed, or CC names something else."""
    gcc = tmp_path / "gcc"
    gcc.write_text(program)
    gcc.chmod(0o755)
    monkeypatch.setenv("CC", str(gcc))
    assert "does not take the arguments of clang: unset CC, or set CC=clang" in KINDS["CPU"].why_missing()
    with pytest.raises(DeviceError, match="unset CC"):
        open_device()
    assert "CPU" not in kinds.choice(failed="CPU")  # what was asked for is no way out
    assert ("METAL" in kinds.choice(failed="CPU")) == (sys.platform == "darwin")  # nothing makes another computer a Mac
    monkeypatch.setenv("CC", os.environ.get("TESTS_CC", "clang"))
    assert not KINDS["CPU"].why_missing()


def test_kinds_import_tinygrad_only_when_a_device_is_open() -> None:
    """Their settings are made before tinygrad is imported, so no file imports it where it is itself imported."""
    files = sorted(Path(kinds.__file__).parent.glob("*.py"))
    assert len(files) == len(KINDS) + 2  # and the base class, and the registry
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "tinygrad"], file.name
