"""What each process of a server does first: read its spec, log under its name, and end with its parent."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tinyvllm.faults import reach
from tinyvllm.late_methods import make_methods_late
from tinyvllm.processes import STOP_SIGNALS, collect_rarely, die_with_parent, ignore_meaningless_signals
from tinyvllm.profiling import measure
from tinyvllm.server.context import AccessLogFilter, RequestIdFilter
from tinyvllm.server.control import ChildLink
from tinyvllm.server.file_limit import raise_file_limit
from tinyvllm.server.output_queue import queue_outputs, show_stacks_on_usr1
from tinyvllm.server.specs import Spec

log = logging.getLogger(__name__)

AnySpec = TypeVar("AnySpec", bound=Spec)

PIDS_FILE = "processes.json"  # in the run directory: the processes by name, rewritten whenever one starts


def prepare_process() -> None:
    """Called first in every process of a server, `tinyvllm serve` itself included: its output goes through a queue,
    SIGUSR1 shows its stacks, and signals that have no meaning here do not end it."""
    queue_outputs()
    show_stacks_on_usr1()
    ignore_meaningless_signals()
    raise_file_limit()


def start_child(kind: type[AnySpec]) -> tuple[AnySpec, ChildLink]:
    """The spec that the parent sends, and the link to it. The argument of the command is the link's file descriptor."""
    collect_rarely()
    make_methods_late()
    # the supervisor decides when to stop: an orchestrator's signal may reach every process of the server. Not SIG_IGN,
    # which would pass to programs that this process starts, so that they could not be ended
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)
    prepare_process()
    die_with_parent(os.getppid())
    link = ChildLink(int(sys.argv[1]))
    spec = msgspec.convert(link.receive()["spec"], kind)
    set_up_logging(spec.log_level, spec.log_prefix + spec.name)
    measure.name_process(spec.name)
    return spec, link


def set_up_logging(level: str, name: str) -> None:
    """Log to stderr like the command line, with the process's name in each line."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}: %(message)s"))
    handler.addFilter(AccessLogFilter())
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for logger in ("tinyvllm", "uvicorn.access"):
        logging.getLogger(logger).setLevel(level.upper())


def find(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def read_pids(run_dir: Path) -> dict[str, int]:
    """The server's processes by name."""
    try:
        pids: dict[str, int] = json.loads((run_dir / PIDS_FILE).read_bytes())
    except FileNotFoundError:
        return {}
    return pids


def write_pids(run_dir: Path, pids: dict[str, int]) -> None:
    path = run_dir / f"{PIDS_FILE}.new"
    try:
        reach("disk.pids")
        path.write_text(json.dumps(pids))
        path.replace(run_dir / PIDS_FILE)  # readers see the old file or the new one
    except (OSError, MemoryError) as error:  # it only informs
        log.warning("%s cannot be written: %s", PIDS_FILE, error)
