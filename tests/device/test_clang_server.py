"""A compiler that forks for each source makes what it makes when it is started for each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tinyvllm.device  # noqa: F401  (before tinygrad)
from tinyvllm.device import clang_server
from tinyvllm.device.clang_server import ClangServer, make_library

from tinygrad.helpers import getenv  # isort: skip  (tinyvllm makes its settings first)
from tinygrad.runtime.support import compiler_cpu  # isort: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux only")

SOURCES = [f"void add(int* restrict x, int n) {{ for (int i = 0; i < n; i++) x[i] += {k}; }}" for k in range(3)]


@pytest.fixture(autouse=True)
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, ClangServer | None]]:
    """No servers before and after a test, and tinygrad's compiler as it was."""
    found: dict[Any, ClangServer | None] = {}
    monkeypatch.setattr(clang_server, "_servers", found)
    monkeypatch.setattr(compiler_cpu, "subprocess", subprocess)
    getenv.cache_clear()  # tinygrad reads a variable once
    yield found
    for server in found.values():
        if server is not None:
            server.close()
    getenv.cache_clear()


def compile_all() -> list[bytes]:
    compiler = compiler_cpu.ClangCompiler(["x86_64", "native"])
    return [compiler.compile(source) for source in SOURCES]


def compile_with(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a shell script be the compiler, which does this before it runs the compiler of tests."""
    compiler = folder / "cc"
    compiler.write_text(f'#!/bin/sh\n{script}\nexec "{os.environ.get("CC", "clang")}" "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    getenv.cache_clear()


def test_objects_are_those_of_a_compiler_that_starts(servers: dict[Any, ClangServer | None]) -> None:
    started = compile_all()
    clang_server.use_servers()
    assert compile_all() == started
    assert len(servers) == 1 and None not in servers.values()


def test_a_source_with_an_error_fails_as_usual(
    servers: dict[Any, ClangServer | None], capfd: pytest.CaptureFixture[str]
) -> None:
    clang_server.use_servers()
    with pytest.raises(subprocess.CalledProcessError):
        compiler_cpu.ClangCompiler(["x86_64", "native"]).compile("nonsense")
    assert capfd.readouterr().err.count("unknown type name") == 1
    made = compile_all()  # the server goes on
    (server,) = servers.values()
    assert server is not None and server.is_running() and all(made)


def test_a_killed_server_is_done_without(servers: dict[Any, ClangServer | None]) -> None:
    clang_server.use_servers()
    first = compile_all()
    (server,) = servers.values()
    assert server is not None
    server.process.kill()
    server.process.wait()
    assert compile_all() == first
    assert list(servers.values()) == [None]


def test_a_compiler_that_loads_no_library_is_started_for_each(
    servers: dict[Any, ClangServer | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = compile_all()
    monkeypatch.setattr(clang_server, "make_library", lambda: os.memfd_create("empty"))
    clang_server.use_servers()
    assert compile_all() == started == compile_all()
    assert list(servers.values()) == [None]


def test_a_compiler_that_makes_no_library_is_started_for_each(
    servers: dict[Any, ClangServer | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = compile_all()
    compile_with('case "$*" in *-shared*) exit 1;; esac', tmp_path, monkeypatch)
    assert make_library() is None
    clang_server.use_servers()
    assert compile_all() == started
    assert list(servers.values()) == [None]


def test_a_script_may_be_the_compiler(
    servers: dict[Any, ClangServer | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = compile_all()
    compile_with(":", tmp_path, monkeypatch)
    clang_server.use_servers()
    assert compile_all() == started


def test_a_server_ends_with_its_parent() -> None:
    program = (
        "import tinyvllm.device\nfrom tinyvllm.device.clang_server import ClangServer, make_library\n"
        "server = ClangServer(['clang', '-c', '-x', 'c', '-', '-o', '-'], make_library())\n"
        "assert server.compile(b'int one;')\nprint(server.process.pid, flush=True)\nimport os\nos._exit(0)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    deadline = time.monotonic() + 10.0
    while os.path.exists(f"/proc/{int(run.stdout)}"):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.01)
