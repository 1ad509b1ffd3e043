"""tinygrad's disk cache of compiled programs, opened for use on any thread, and for systems where it cannot be kept."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterable
from typing import Any

from tinygrad import helpers

logger = logging.getLogger(__name__)


def share_disk_cache() -> None:
    """Open tinygrad's SQLite cache ourselves, before it does.

    tinygrad keeps one connection per process, and Python's SQLite binding ties it to the thread that opened it, so an
    engine on a second thread could not compile. Only one thread at a time uses the device, which is enough for SQLite.
    If the file cannot be opened (a read-only root, no home directory), the cache is kept in memory.
    """
    if helpers._db_connection is not None:
        return
    path = helpers.CACHEDB
    try:
        if f"{os.sep}~{os.sep}" in path:  # not expanded: this user has no home directory
            raise OSError("this user has no home directory")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        helpers._db_connection = _open(path)
    except (OSError, sqlite3.Error) as error:
        logger.warning("tinygrad's compiled programs are not kept for the next start: %s: %s", path, error)
        helpers._db_connection = _open(":memory:")


def _open(path: str) -> _Connection:
    """Raises sqlite3.Error if the file is not a database or cannot be read."""
    connection = sqlite3.connect(
        path, timeout=60, isolation_level="IMMEDIATE", check_same_thread=False, factory=_Connection
    )
    with contextlib.suppress(sqlite3.OperationalError):  # another process is setting it now
        sqlite3.Cursor(connection).execute("PRAGMA journal_mode=WAL").fetchone()
    sqlite3.Cursor(connection).execute("PRAGMA synchronous=NORMAL")
    sqlite3.Cursor(connection).execute("SELECT count(*) FROM sqlite_master").fetchone()
    return connection


class _Connection(sqlite3.Connection):
    """Goes on without the cache once a write has failed, for example because the disk is full or the file belongs to
    another user."""

    is_writable = True

    def cursor(self, factory: Any = None) -> sqlite3.Cursor:  # type: ignore[override]
        return _Cursor(self)

    def commit(self) -> None:
        try:
            super().commit()
        except sqlite3.Error as error:
            self.give_up(error)

    def give_up(self, error: sqlite3.Error) -> None:
        if self.is_writable:
            self.is_writable = False
            logger.warning("tinygrad's compiled programs are not kept any more: %s: %s", helpers.CACHEDB, error)
        with contextlib.suppress(sqlite3.Error):
            self.rollback()


class _Cursor(sqlite3.Cursor):
    def execute(self, sql: str, parameters: Iterable[Any] = ()) -> sqlite3.Cursor:  # type: ignore[override]
        """Raises OperationalError if nothing can be read, which tinygrad takes for a miss. A write never raises."""
        connection: _Connection = self.connection  # type: ignore[assignment]
        if sql.startswith("SELECT"):
            try:
                return super().execute(sql, parameters)  # type: ignore[arg-type]
            except sqlite3.Error as error:  # a table that does not exist, or a damaged file
                raise sqlite3.OperationalError(str(error)) from error
        if connection.is_writable:
            try:
                super().execute(sql, parameters)  # type: ignore[arg-type]
            except sqlite3.Error as error:
                connection.give_up(error)
        return self
