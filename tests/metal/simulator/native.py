"""Kernels as machine code: compiled by clang with its thread sanitizer's instrumentation, kept by the hash of what they
were made from, and run by runtime.cpp, whose findings become sentences here."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.metal.simulator.msl import Kernel, to_cpp

HERE = Path(__file__).parent
RUNTIME, HEADER = HERE / "runtime.cpp", HERE / "metal_stdlib"
# -O1: -O2 takes twice as long to compile, and the checks, which cost most of a run, stay as they are. No contraction:
# a product and a sum round twice on every machine alike.
FLAGS = (
    "-x c++ -std=c++17 -O1 -g0 -w -fPIC -shared -fno-exceptions -fno-rtti -fno-math-errno -fno-strict-aliasing"
    " -fsigned-char -ffp-contract=off -nostdlib"
)
CHECKS = "-fsanitize=thread -mllvm -tsan-instrument-func-entry-exit=0 -mllvm -tsan-instrument-atomics=0"
RUNTIME_FLAGS = "-x c++ -std=c++17 -O2 -w -fPIC -shared -fno-exceptions -fno-rtti"
COMPILERS = 2  # at the same time

FAULTS = (
    "none",
    "divergent barrier",
    "divergent simdgroup",
    "partial simdgroup",
    "race, read after write",
    "race, write after read",
    "race, write after write",
    "unwritten threadgroup memory",
    "outside threadgroup memory",
    "outside its buffers",
    "race in device memory",
)
WAITS = ("runs", "a barrier", "a simdgroup barrier", "a shuffle", "a matrix product", "its end")


class CompilerError(RuntimeError):
    """There is no clang, or it refuses a kernel."""


class KernelFault(RuntimeError):
    """What a kernel did wrong. `kind` is one of FAULTS."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class _Size(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32))


class _Binding(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("writers", ctypes.c_void_p))


class _Report(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("fault", "thread", "other", "size", "is_write")),
        *((name, ctypes.c_uint32) for name in ("line", "other_line", "state", "other_state")),
        ("group", _Size),
        ("address", ctypes.c_uint64),
    )


class _Dispatch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("bindings", ctypes.c_void_p),
        ("num_bindings", ctypes.c_uint32),
        ("threadgroup_bytes", ctypes.c_uint32),
        ("grid", _Size),
        ("threads", _Size),
        ("meets", ctypes.c_uint32),
        ("reversed", ctypes.c_uint32),
        ("report", _Report),
    )


@dataclass(frozen=True)
class Argument:
    """Memory bound to a parameter: where it lies, how much of it there is, and the shadow of a watched buffer."""

    address: int
    nbytes: int
    shadow: int = 0


class Natives:
    """Compiles and keeps kernels. `is_checked`: with every access to memory looked at, which takes most of a run."""

    def __init__(self, folder: Path, *, is_checked: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._is_checked = folder, is_checked
        self._pool = ThreadPoolExecutor(COMPILERS, thread_name_prefix="clang")
        self._futures: dict[str, Future[Path]] = {}
        self._entries: dict[str, int] = {}
        self._libraries: list[ctypes.CDLL] = []  # must stay loaded
        self._runtime: ctypes.CDLL | None = None
        self.num_compiled = 0
        self.num_dispatches = 0

    def start(self, kernel: Kernel) -> None:
        """Compile in the background: the source is there long before it is first run."""
        if kernel.source not in self._futures:
            self._futures[kernel.source] = self._pool.submit(self._compile, kernel)

    def run(
        self,
        kernel: Kernel,
        arguments: list[Argument],
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        *,
        is_reversed: bool = True,
    ) -> None:
        """One dispatch. Raises KernelFault, CompilerError."""
        runtime, entry = self._load_runtime(), self._entry(kernel)
        pointers = (ctypes.c_void_p * max(1, len(arguments)))(*(argument.address for argument in arguments))
        bindings = (_Binding * max(1, len(arguments)))(
            *(_Binding(a.address, a.address + a.nbytes, a.shadow or None) for a in arguments)
        )
        dispatch = _Dispatch(
            entry, ctypes.addressof(pointers), ctypes.addressof(bindings), len(arguments), kernel.threadgroup_bytes,
            _Size(*grid), _Size(*threads), kernel.meets, is_reversed,
        )  # fmt: skip
        runtime.sim_dispatch(ctypes.byref(dispatch))
        self.num_dispatches += 1
        if dispatch.report.fault:
            raise _fault(kernel, dispatch.report, arguments, ctypes.addressof(self._threadgroup_memory()))

    # -- compiling -----------------------------------------------------------------------------------------------------

    def _entry(self, kernel: Kernel) -> int:
        if kernel.source not in self._entries:
            self.start(kernel)
            library = ctypes.CDLL(str(self._futures[kernel.source].result()))
            self._libraries.append(library)
            self._entries[kernel.source] = ctypes.cast(library.sim_entry, ctypes.c_void_p).value or 0
        return self._entries[kernel.source]

    def _compile(self, kernel: Kernel) -> Path:
        flags = [*FLAGS.split(), *_processor_flags(), *(CHECKS.split() if self._is_checked else ["-O2"])]
        return self._build(to_cpp(kernel), [*flags, f"-I{HERE}"], kernel.name)

    def _load_runtime(self) -> ctypes.CDLL:
        if self._runtime is None:
            path = self._build(RUNTIME.read_text(encoding="utf-8"), RUNTIME_FLAGS.split(), "runtime")
            self._runtime = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # kernels find its functions by name
        return self._runtime

    def _threadgroup_memory(self) -> ctypes.Array[ctypes.c_char]:
        return (ctypes.c_char * 1).in_dll(self._load_runtime(), "sim_threadgroup")

    def _build(self, source: str, flags: list[str], name: str) -> Path:
        """A shared library made from the source, unless there is one of the same."""
        made_from = "\0".join([source, HEADER.read_text(encoding="utf-8"), *flags, _compiler_version()])
        path = self.folder / f"{hashlib.sha256(made_from.encode()).hexdigest()[:40]}.so"
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            text, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            text.write_text(source)
            command = [find_clang(), *flags, str(text), "-o", str(library), "-lm", "-lc"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CompilerError(f"clang refuses {name}:\n{done.stderr[:2000]}")
            self.num_compiled += 1
            library.replace(path)
        return path


@cache
def find_clang() -> str:
    """CC, as it was before the tests set it, where it names a clang, else clang. Raises CompilerError."""
    for name in (os.environ.get("TESTS_CC", ""), os.environ.get("CC", ""), "clang"):
        if "clang" in name and (path := shutil.which(name)):
            return path
    raise CompilerError("the METAL simulator compiles kernels with clang: install one (Debian: apt-get install clang)")


@cache
def _compiler_version() -> str:
    return subprocess.run([find_clang(), "--version"], capture_output=True, text=True, check=True).stdout


def _processor_flags() -> list[str]:
    return ["-mf16c"] if platform.machine() == "x86_64" else []


# -- faults in words ---------------------------------------------------------------------------------------------------


def _fault(kernel: Kernel, report: _Report, arguments: list[Argument], threadgroup: int) -> KernelFault:
    kind = FAULTS[report.fault]
    group = (report.group.x, report.group.y, report.group.z)
    where = f"kernel {kernel.name}, threadgroup {group}"
    verb = "writes" if report.is_write else "reads"
    if kind.startswith("divergent"):
        text = f"thread {report.thread} is at {_place(kernel, report.state, report.line)}, " + (
            f"thread {report.other} at {_place(kernel, report.other_state, report.other_line)}"
        )
    elif kind == "partial simdgroup":
        text = f"{report.size} threads are at line {report.line}, {kernel.line(report.line)!r}, which takes all 32"
    elif kind == "outside its buffers":
        text = f"thread {report.thread} {verb} {report.size} bytes {_nearest(kernel, report.address, arguments)}"
    elif kind == "race in device memory":
        text = f"thread {report.thread} {verb} {_inside(kernel, report.address, arguments)}, " + (
            f"which thread {report.other} of the same dispatch wrote, maybe of another threadgroup"
        )
    else:
        text = f"thread {report.thread} {verb} {report.size} bytes of {_shared(kernel, report.address - threadgroup)}"
        text += {
            "unwritten threadgroup memory": ", which nobody wrote",
            "outside threadgroup memory": f", but the kernel has {kernel.threadgroup_bytes} bytes",
        }.get(kind, f", which thread {_thread(report.other)} accessed after the last barrier")
    return KernelFault(kind, f"{where}: {text}")


def _thread(number: int) -> str:
    return "of several" if number == 0xFFFF else str(number)


def _place(kernel: Kernel, state: int, line: int) -> str:
    return WAITS[state] if state == len(WAITS) - 1 else f"{WAITS[state]} in line {line}, {kernel.line(line)!r}"


def _shared(kernel: Kernel, offset: int) -> str:
    for array in kernel.shared:
        if array.offset <= offset < array.offset + array.nbytes:
            return f"{array.name} at byte {offset - array.offset}"
    return f"threadgroup memory at byte {offset}"


def _inside(kernel: Kernel, address: int, arguments: list[Argument]) -> str:
    for param, argument in zip(kernel.params, arguments, strict=True):
        if argument.address <= address < argument.address + argument.nbytes:
            return f"{param.name} at byte {address - argument.address}"
    return f"address {address:#x}"


def _nearest(kernel: Kernel, address: int, arguments: list[Argument]) -> str:
    """The buffer that an address is least far from."""

    def distance(argument: Argument) -> int:
        return max(argument.address - address, address - argument.address - argument.nbytes, 0)

    if not arguments:
        return "without any buffer"
    param, nearest = min(zip(kernel.params, arguments, strict=True), key=lambda pair: distance(pair[1]))
    return f"at byte {address - nearest.address} of {param.name}, which has {nearest.nbytes}"
