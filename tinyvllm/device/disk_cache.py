"""tinygrad's disk cache of compiled programs, opened for use on any thread."""

from __future__ import annotations

import contextlib
import os
import sqlite3

from tinygrad import helpers


def share_disk_cache() -> None:
    """Open tinygrad's SQLite cache ourselves, before it does.

    tinygrad keeps one connection per process, and Python's SQLite binding ties it to the thread that opened it, so an
    engine on a second thread could not compile. Only one thread at a time uses the device, which is enough for SQLite.
    """
    if helpers._db_connection is not None:
        return
    os.makedirs(os.path.dirname(helpers.CACHEDB), exist_ok=True)
    connection = sqlite3.connect(helpers.CACHEDB, timeout=60, isolation_level="IMMEDIATE", check_same_thread=False)
    with contextlib.suppress(sqlite3.OperationalError):  # another process is setting it now
        connection.execute("PRAGMA journal_mode=WAL").fetchone()
    connection.execute("PRAGMA synchronous=NORMAL")
    helpers._db_connection = connection
