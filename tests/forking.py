"""Processes that are forked from the test's own, so that they need not import what it has imported: that takes most of
them longer than all else. They must not use tinygrad's device, which this process may have opened: they would share its
memory, and lack its threads. Such processes, and those of tests of a start itself, are new ones."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from tinyvllm import faults
from tinyvllm.server.output_queue import exit_now

MAX_FDS = 1 << 12  # descriptors above are not closed


def started(module: str, arguments: Sequence[str], env: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
    """A new Python that runs `module`."""
    return subprocess.Popen([sys.executable, "-m", module, *arguments], text=True, env=dict(env), **options)


def printed_by(code: str) -> str:
    """What a new Python prints that runs `code`, and does not fail."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def forked(
    program: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    prepare: Callable[[], None] | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """As `started`, with this process's modules; `program` may also be code, of several lines, as for `python -c`.
    prepare: runs in the child first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on, of a fork beside threads: it takes none of their locks
        return subprocess.Popen(
            [sys.executable, *arguments], text=True, **fork_options(program, arguments, env, prepare=prepare), **options
        )


def fork_options(
    program: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    fds: Sequence[int] = (),
    prepare: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Options of subprocess.Popen that make the child run `program` where it would otherwise become another program.

    `fds` stay open in it. It never returns to its caller, whose frames keep alive what they refer to.
    A test's time limit has its signal alone from here on.
    """
    # the child's own timer would wait for a lock that this one's thread holds (StopClock has one)
    faulthandler.cancel_dump_traceback_later()

    def run() -> None:
        run_in_fork(program, arguments, env, fds, prepare)

    return {"preexec_fn": run, "pass_fds": tuple(fds), "restore_signals": False, "env": dict(env)}


def run_in_fork(
    program: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    fds: Sequence[int] = (),
    prepare: Callable[[], None] | None = None,
) -> NoReturn:
    """Make of this process, which was just forked, one that runs `program`."""
    code = 1
    try:
        _forget_parent(fds)
        if prepare is not None:
            prepare()
        os.environ.clear()
        os.environ.update(env)
        faults._plan = faults._inherited()
        if "\n" in program:
            sys.argv = ["-c", *arguments]
            exec(program, {"__name__": "__main__"})
        else:
            sys.argv = [program, *arguments]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        exit_now(code)  # with what a server has queued of its log


def _forget_parent(fds: Sequence[int]) -> None:
    """Make of a fork, as far as it matters here, what a new process is: its streams, signals, logging and warnings."""
    gc.freeze()  # what the parent had is never collected, which might close a descriptor that is another's here
    gc.enable()
    faulthandler.disable()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start = 3
    for fd in (*sorted(fds), MAX_FDS):
        os.closerange(start, fd)  # also of the pipe at which Popen waits for an exec
        start = fd + 1
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    loggers = (logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger))
    for logger in (logging.root, *loggers):
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET if logger.parent else logging.WARNING)
        logger.propagate, logger.disabled = True, False  # uvicorn changes it where nothing is logged
    warnings.resetwarnings()
    warnings.simplefilter("ignore")


def fork_children() -> None:
    """From here on, processes that servers start are forks of the one that starts them. On asyncio's loop: uvloop has
    no function that runs in the child."""
    from tinyvllm.server import event_loop

    event_loop.run = asyncio.run
    asyncio.create_subprocess_exec = forking_instead_of(asyncio.create_subprocess_exec)


def forking_instead_of(start: Callable[..., Any]) -> Callable[..., Any]:
    """asyncio.create_subprocess_exec for `python -m module`, by a fork of this process."""

    async def fork(*command: str, pass_fds: Sequence[int], env: Mapping[str, str], **options: Any) -> Any:
        module, *arguments = command[command.index("-m") + 1 :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return await start(*command, **fork_options(module, arguments, env, pass_fds), **options)

    return fork
