"""Kernels are compiled with flags that save clang's time, where they do not cost the kernel's."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

import tinyvllm.device  # noqa: F401  (before tinygrad)
from tinyvllm.device import clang_flags, clang_server
from tinyvllm.device.clang_flags import FEWER_COPIES, use_fewer_copies
from tinyvllm.execution import tracing

from tinygrad.helpers import getenv  # isort: skip  (tinyvllm makes its settings first)
from tinygrad.runtime.support.compiler_cpu import ClangCompiler  # isort: skip

QUANTIZED = ("qkv_Q4_1_8x320x576", "attention_4096x3x64", "lm_head_nf42Dfloat32_1x32x64")
DENSE = ("qkv_float16_8x320x576", "lm_head_bfloat16_1x32x64")


def compile_with(script: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The arguments that the compiler gets last. script: what it does with them."""
    compiler, log = folder / "cc", folder / "log"
    compiler.write_text(f'#!/bin/sh\necho "$@" > {log}\n{script}\n')
    compiler.chmod(0o755)
    use_fewer_copies()
    with monkeypatch.context() as patch:
        patch.setenv("CC", str(compiler))
        getenv.cache_clear()  # tinygrad reads a variable once
        made = ClangCompiler(["x86_64", "native"]).compile(f"void {name}(int* data0) {{ *data0 = 1; }}")
    getenv.cache_clear()
    assert made == b"made\n"
    return log.read_text()


@pytest.mark.parametrize("name", [*QUANTIZED, *DENSE])
def test_dense_products_are_unrolled_as_clang_likes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = compile_with("echo made", name, tmp_path, monkeypatch)
    assert (" ".join(FEWER_COPIES) in arguments) == (name in QUANTIZED) and "-O2" in arguments


def test_a_compiler_without_these_flags_compiles_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = 'case "$*" in *-mllvm*) exit 1;; esac; echo made'
    assert "-mllvm" not in compile_with(refusing, QUANTIZED[0], tmp_path, monkeypatch)


def test_a_template_asks_the_compiler_for_all_that_it_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    run = mock.Mock()
    monkeypatch.setattr("tinyvllm.device.clang_flags.subprocess.run", run)
    monkeypatch.setattr(tracing, "import_kernels", lambda is_cpu: None)
    monkeypatch.setenv("CC", "a compiler of this test")
    tracing.prepare_there(False)
    assert not run.called
    for _ in range(2):
        tracing.prepare_there(True)
        clang_flags.knows_flags()
        clang_server.make_library()
    assert run.call_count == 2
