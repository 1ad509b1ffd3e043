"""The number of files that a process may have open: each connection takes one."""

from __future__ import annotations

import contextlib
import sys

WANTED_FILES = 65_536  # macOS allows no process more than kern.maxfilesperproc, whatever its hard limit says
MACOS_FILES = 10_240  # OPEN_MAX
RESERVED_FILES = 256  # for models, sockets of the server's own, pipes and libraries
MAX_CONNECTIONS = 16_384


def raise_file_limit() -> None:
    """Raise the soft limit to the hard limit; many systems set it to 1,024 or 256."""
    try:
        import resource  # here: not every system has it
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_endless = hard == resource.RLIM_INFINITY
    for wanted in (WANTED_FILES, MACOS_FILES):
        limit = wanted if is_endless else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= limit:
            return
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return


def file_limit() -> int:
    """The soft limit; if the system has none, more than are ever needed."""
    if sys.platform == "win32":
        return WANTED_FILES
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return WANTED_FILES if soft == resource.RLIM_INFINITY else soft


def default_max_connections() -> int:
    """The maximum number of connections that leaves enough files for everything else."""
    limit = file_limit()
    return max(16, min(MAX_CONNECTIONS, limit - min(RESERVED_FILES, limit // 2)))
