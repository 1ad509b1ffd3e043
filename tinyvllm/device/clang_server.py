"""A C compiler that has started once and forks for each source.

Clang takes 25 ms of processor time to start, most of it for half a million relocations of its libraries. A library
that is loaded before them (LD_PRELOAD) has clang's `main` wait, and fork for each request: a copy of the process then
runs `main` as if it had just been started, and writes the same object. Linux only. Where this does not work, with a
static compiler or without a linker, a compiler is started for each source.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from tinygrad.runtime.support import compiler_cpu

# Declares what it calls, because a machine with clang need not have the C library's headers. glibc and musl both call
# `main` through __libc_start_main, after libraries are initialized. -1 is RTLD_NEXT.
LIBRARY = """
typedef int Main(int, char **, char **);
typedef int Start(Main *, int, char **, void *, void *, void *, void *);
int atoi(const char *), close(int), fork(void), getpid(void), getppid(void), prctl(int, ...);
int unsetenv(const char *), waitpid(int, int *, int);
long read(int, void *, unsigned long), write(int, const void *, unsigned long);
char *getenv(const char *), *strrchr(const char *, int);
void *dlsym(void *, const char *);
_Noreturn void _exit(int);

static Main *compile;

static int die_with_parent(void) { return prctl(1, 9); }  // PR_SET_PDEATHSIG, SIGKILL

static int serve(int argc, char **argv, char **envp) {
  const int control = atoi(getenv("TINYVLLM_CLANG_CONTROL")), own = getpid();
  char *const preload = getenv("LD_PRELOAD"), *const last = preload ? strrchr(preload, ':') : 0;
  if (last) *last = 0;  // a compiler that starts another process should not have that serve
  else unsetenv("LD_PRELOAD");
  die_with_parent();
  for (char request; read(control, &request, 1) == 1;) {
    const int child = fork();
    if (child == 0) {
      close(control);  // whoever waits for an answer learns at once that this process's parent is gone
      die_with_parent();
      if (getppid() != own) _exit(1);
      return compile(argc, argv, envp);
    }
    int status = -1;
    if (child > 0) waitpid(child, &status, 0);
    if (write(control, &status, sizeof status) != sizeof status) break;
  }
  _exit(0);
}

int __libc_start_main(Main *main, int argc, char **argv, void *init, void *fini, void *ld_fini, void *stack) {
  compile = main;
  return ((Start *)dlsym((void *)-1l, "__libc_start_main"))(serve, argc, argv, init, fini, ld_fini, stack);
}
"""
_STATUS_BYTES = 4


class ClangServer:
    """Compiles with one command, which reads its standard input and writes to its standard output. Its process ends
    with the thread that started it, whatever it is doing. For that thread."""

    def __init__(self, command: Sequence[str], library: int) -> None:
        """library: a file descriptor. Raises OSError."""
        self._source, self._object = _make_file("source"), _make_file("object")
        self._socket, there = socket.socketpair()
        with there, open(os.devnull, "wb") as errors:  # whoever compiles after a failure shows them
            preload = [*filter(None, [os.environ.get("LD_PRELOAD")]), f"/proc/self/fd/{library}"]  # ours is the last
            control = {"LD_PRELOAD": ":".join(preload), "TINYVLLM_CLANG_CONTROL": str(there.fileno())}
            self.process = subprocess.Popen(
                command,
                stdin=self._source,
                stdout=self._object,
                stderr=errors,
                env={**os.environ, **control},
                pass_fds=(there.fileno(), library),
            )

    def compile(self, source: bytes) -> bytes | None:
        """The object; None if there is none."""
        for file in (self._source, self._object):  # the process has the same offsets
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
        os.pwrite(self._source, source, 0)
        try:
            self._socket.sendall(b"c")
            status = self._socket.recv(_STATUS_BYTES)
        except OSError:
            return None
        if status != bytes(_STATUS_BYTES):
            return None
        return os.pread(self._object, os.fstat(self._object).st_size, 0)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self._socket.close()
        self.process.wait()
        os.close(self._source)
        os.close(self._object)


_servers: dict[tuple[str, ...], ClangServer | None] = {}  # of this process, by their commands; None: it has failed


def use_servers() -> None:
    """Have tinygrad's C compiler compile by servers from now on, in this process."""
    if sys.platform == "linux":
        vars(compiler_cpu)["subprocess"] = SimpleNamespace(check_output=_check_output)


def _check_output(command: list[str], *, input: bytes) -> bytes:
    made = _compile_there(tuple(command), input)
    return subprocess.check_output(command, input=input) if made is None else made


def _compile_there(command: tuple[str, ...], source: bytes) -> bytes | None:
    if command not in _servers:
        _servers[command] = _start(command)
    server = _servers[command]
    made = None if server is None else server.compile(source)
    if server is not None and made is None and not server.is_running():
        server.close()
        _servers[command] = None
    return made


def _start(command: tuple[str, ...]) -> ClangServer | None:
    if (library := make_library()) is None:
        return None
    with contextlib.suppress(OSError):
        return ClangServer(command, library)
    return None


def make_library() -> int | None:
    """A file descriptor with the library; None if it cannot be made. It takes 0.1 s, once: what this process forks has
    it."""
    return _make_library(os.environ.get("CC", "clang")) if sys.platform == "linux" else None


@functools.cache
def _make_library(compiler: str) -> int | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        flags = ("-O1", "-shared", "-fPIC", "-nostdlib", "-fno-builtin")
        command = [compiler, *flags, "-x", "c", "-", "-o", str(path)]
        subprocess.run(command, input=LIBRARY.encode(), capture_output=True, check=True)
        file = _make_file("library")
        os.write(file, path.read_bytes())
        return file
    return None


def _make_file(name: str) -> int:
    """Of no folder. Raises OSError."""
    if hasattr(os, "memfd_create"):  # not in a Python that was built for an old C library
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
