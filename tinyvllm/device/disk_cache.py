"""tinygrad's cache of compiled programs, opened so that any thread may use it."""

from __future__ import annotations

import contextlib
import os
import sqlite3

from tinygrad import helpers


def share_disk_cache() -> None:
    """Open tinygrad's SQLite cache ourselves, before it does.

    tinygrad keeps one connection a process, and SQLite's Python binding ties a connection to the thread that made it:
    an engine started on a second thread could not compile. One thread at a time uses the device, which is all that
    SQLite needs.
    """
    if helpers._db_connection is not None:
        return
    os.makedirs(os.path.dirname(helpers.CACHEDB), exist_ok=True)
    connection = sqlite3.connect(helpers.CACHEDB, timeout=60, isolation_level="IMMEDIATE", check_same_thread=False)
    with contextlib.suppress(sqlite3.OperationalError):  # another process is just setting it
        connection.execute("PRAGMA journal_mode=WAL").fetchone()
    connection.execute("PRAGMA synchronous=NORMAL")
    helpers._db_connection = connection
