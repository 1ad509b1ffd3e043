"""A compiler that forks for each source makes what it makes when it is started for each."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tinyvllm.device  # noqa: F401  (before tinygrad)
from tests.patience import wait_for
from tests.server.test_control import is_running, wait_until_gone
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


def test_a_python_without_memory_files_has_servers_too(
    servers: dict[Any, ClangServer | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many are built for an old C library."""
    started = compile_all()
    monkeypatch.delattr(os, "memfd_create")
    clang_server._make_library.cache_clear()
    clang_server.use_servers()
    assert compile_all() == started
    assert len(servers) == 1 and None not in servers.values()


def test_a_users_own_library_stays(
    servers: dict[Any, ClangServer | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, library, seen = compile_all(), tmp_path / "own.so", tmp_path / "seen"
    flags = ["-shared", "-fPIC", "-nostdlib", "-x", "c", "-", "-o", str(library)]
    subprocess.run([os.environ.get("CC", "clang"), *flags], input=b"int own;", check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    compile_with(f'echo "$LD_PRELOAD" >> "{seen}"', tmp_path, monkeypatch)
    clang_server.use_servers()
    assert compile_all() == started
    assert None not in servers.values()
    assert set(seen.read_text().splitlines()) == {str(library)}


def make_slow_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It never ends. The file that will have its id."""
    pid = folder / "pid"
    script = f'case "$*" in *-shared*) ;; *) echo $$ > "{pid}.new"; mv "{pid}.new" "{pid}"; exec sleep 1000;; esac'
    compile_with(script, folder, monkeypatch)
    return pid


def test_a_server_that_is_killed_while_it_compiles_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, library = make_slow_compiler(tmp_path, monkeypatch), make_library()
    assert library is not None
    server = ClangServer([str(tmp_path / "cc")], library)
    made: list[bytes | None] = []
    thread = threading.Thread(target=lambda: made.append(server.compile(b"")), daemon=True)
    thread.start()
    wait_for(pid.exists)
    server.process.kill()
    thread.join(10.0)
    assert made == [None]
    server.close()
    wait_until_gone([int(pid.read_text())])


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_server_ends_with_its_parent(is_busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = make_slow_compiler(tmp_path, monkeypatch) if is_busy else tmp_path / "none"
    program = (
        "import os, sys\nimport tinyvllm.device\n"
        "from tinyvllm.device.clang_server import ClangServer, make_library\n"
        "server = ClangServer([os.environ.get('CC', 'clang'), '-c', '-x', 'c', '-', '-o', '-'], make_library())\n"
        "print(server.process.pid, flush=True)\nassert server.compile(b'int one;')\n"
        "print('done', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline())]
        if is_busy:
            wait_for(pid.exists)
            pids.append(int(pid.read_text()))
        else:
            assert process.stdout.readline() == "done\n"
        assert all(map(is_running, pids))
        process.kill()
    wait_until_gone(pids)
