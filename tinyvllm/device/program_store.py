"""Compiled kernels and recorded steps on disk, so that a second start compiles nothing.

Each file is named by its content: a program by tinygrad's key (a hash of the kernel, the target and the settings of
code generation), a step by execution/step_code.py's `StepCode.name`. The folder's name has everything else that
programs depend on: versions, sources, the compiler, the processor.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import tinygrad
from tinygrad import Device, UOp
from tinygrad.helpers import DEBUG, ContextVar
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import Ops, ProgramInfo

from tinyvllm.device.clang_flags import DENSE, FEWER_COPIES
from tinyvllm.device.private_folder import PrivateFolder, default_root
from tinyvllm.errors import CacheError

logger = logging.getLogger(__name__)

LAYOUT = 1  # version of the files' format
# Read by tinygrad or its compilers from the environment at each use, besides tinygrad's declared settings.
SETTINGS = ("DMC", "ALLOW_HALF8", "HCQ2", "CC", "CUDA_PATH", "NVRTC", "JITBEAM", "BEAM_UOPS_MAX", "PTX")
# tinygrad's scheduler, code generator and runtimes. Its generated bindings are left out: they follow the version.
CODE_FOLDERS = (
    ".", "uop", "schedule", "mixin", "codegen", "codegen/opt", "codegen/late", "codegen/decomp", "engine", "renderer",
    "renderer/isa", "runtime", "runtime/graph", "runtime/support",
)  # fmt: skip
ONLY_SHOWN = (
    "DEBUG",
    "VIZ",
    "PROFILE",
    "NO_COLOR",
    "PARALLEL",
    "TRACEMETA",
    "SPEC",
)  # settings that do not affect code


class ProgramStore:
    """Owns the folder of this device and these versions. Counts what was read and what had to be compiled."""

    def __init__(self, root: Path, device: str) -> None:
        """Raises CacheError if the folder cannot be trusted."""
        self.root = root
        self._folder = PrivateFolder(root, environment_key(device))
        self._has_written = False
        self.num_programs_read = 0
        self.num_programs_compiled = 0
        self.num_steps_read = 0

    def read_program(self, key: tuple) -> UOp | None:
        """The program with tinygrad's key, or None."""
        program = self._folder.read(f"program-{digest_of(key)}")
        if not isinstance(program, UOp) or program.op is not Ops.PROGRAM:
            return None
        self.num_programs_read += 1
        show_compiled(program)
        return program

    def write_program(self, key: tuple, program: UOp) -> None:
        """Save a program that was just compiled."""
        self._write(f"program-{digest_of(key)}", slim(program))
        self.num_programs_compiled += 1

    def read_step(self, name: str) -> object | None:
        """The step that `write_step` saved under this name, or None."""
        step = self._folder.read(f"step-{name}")
        self.num_steps_read += step is not None
        return step

    @property
    def has_steps(self) -> bool:
        """Whether there are any, of whatever model."""
        return self._folder.has("step-")

    def write_step(self, name: str, step: object) -> None:
        self._write(f"step-{name}", step)

    def close(self) -> None:
        """Limit the folder's size if it has grown."""
        if self._has_written:
            self._folder.trim()

    def _write(self, name: str, value: object) -> None:
        self._folder.write(name, value)
        self._has_written = True


def open_program_store(device: str) -> ProgramStore | None:
    """The user's store, or None if it cannot be trusted; a warning then says what to do."""
    try:
        return ProgramStore(default_root(), device)
    except CacheError as error:
        logger.warning("compiled programs are not kept for the next start: %s", error)
        return None


def slim(program: UOp) -> UOp:
    """A PROGRAM with only what running it needs: name, estimates, parameters, source and binary; a tenth of the nodes.
    One without a threadgroup size keeps its kernel."""
    if not isinstance(program.arg, ProgramInfo) or program.arg.local_size is None or len(program.src) < 4:
        return program
    sink, lines, source, binary = program.src[:4]
    parameters = tuple(uop for uop in lines.src if uop.op is Ops.PARAM)
    return program.replace(
        src=(UOp(Ops.SINK, arg=sink.arg), UOp(Ops.LINEAR, src=parameters), source, binary, *program.src[4:])
    )


def show_compiled(program: UOp) -> None:
    """Print what tinygrad prints when it compiles a kernel, since this one was compiled by an earlier process: with
    DEBUG=3 the optimizations that were applied, with DEBUG=4 its source."""
    sink, *others = program.src
    if DEBUG.value >= 3 and sink.arg.applied_opts:
        print(f"{sink.arg.function_name:<25} opts: {sink.arg.applied_opts}")
    if DEBUG.value >= 4:
        for source in (uop.arg for uop in others if uop.op is Ops.SOURCE):
            print(source)


# -- keys ------------------------------------------------------------------------------------------------------------


def environment_key(device: str) -> str:
    """The folder's name: the device, and a hash of everything that its programs depend on besides their keys."""
    return f"{device.replace(':', '_')}-{digest_of(environment_facts(device, Device[device].renderer))}"


def environment_facts(device: str, renderer: Renderer) -> tuple[Any, ...]:
    """What programs depend on besides their keys, except the device's name."""
    settings = {key: var.value for key, var in sorted(ContextVar._cache.items()) if key not in ONLY_SHOWN}
    return (
        LAYOUT,
        importlib.metadata.version("tinygrad"),
        _sources(),
        sys.version_info[:3],
        platform.platform(),  # includes the system's version: a Mac's compiler is part of the system
        type(renderer).__name__,
        str(renderer.target),
        settings,
        {name: os.environ.get(name) for name in SETTINGS},
        _makers(device.split(":")[0]),
    )


@cache
def _sources() -> str:
    """A hash of the sizes and times of tinygrad's files, so that a local edit changes the key."""
    root = Path(tinygrad.__file__).parent
    digest = hashlib.sha256()
    for folder in CODE_FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            info = path.stat()
            digest.update(f"{path.relative_to(root)} {info.st_size} {info.st_mtime_ns} ".encode())
    return digest.hexdigest()


def digest_of(value: object) -> str:
    """A hash of its repr, for a file's name."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:40]


def _makers(kind: str) -> tuple[Any, ...]:
    """What compiles a kind of device's programs, and for which processor, where their keys do not say it."""
    if kind == "CPU":
        return _compiler(), _processor(), FEWER_COPIES, DENSE.pattern
    return file_facts(nvrtc_path()) if kind == "CUDA" else ()


def _compiler() -> tuple[Any, ...]:
    return file_facts(shutil.which(os.environ.get("CC", "clang")))


def nvrtc_path() -> str | None:
    """The file of NVIDIA's compiler."""
    from tinygrad.runtime.autogen.nvrtc import dll  # loads it

    return getattr(dll, "_name", None)


def file_facts(path: str | None) -> tuple[Any, ...]:
    """What an upgrade of a file changes; () if there is none."""
    if path is None:
        return ()
    info = os.stat(path)
    return os.path.realpath(path), info.st_size, info.st_mtime_ns


def _processor() -> str:
    """The processor, which decides what the compiler's `-march=native` means."""
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True)
    with open("/proc/cpuinfo") as file:
        lines = {line for line in file if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "".join(sorted(lines))
