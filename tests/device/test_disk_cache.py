"""tinygrad's disk cache where it cannot be kept: a read-only file, a full disk, no home directory, a damaged file."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from tinygrad import helpers

from tinyvllm.device import disk_cache


@pytest.fixture(autouse=True)
def no_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(helpers, "_db_connection", None)
    monkeypatch.setattr(helpers, "_db_tables", set())
    yield
    assert helpers._db_connection is not None
    helpers._db_connection.close()


def keeps(key: str = "k") -> bool:
    """Whether tinygrad gets back what it puts in. Neither raises."""
    assert helpers.diskcache_put("table", key, [1, 2]) == [1, 2]
    return bool(helpers.diskcache_get("table", key) == [1, 2])


def test_a_folder_that_cannot_be_made_leaves_the_cache_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()  # no folder can be made in it; root may write to read-only ones
    monkeypatch.setattr(helpers, "CACHEDB", str(tmp_path / "file" / "tinygrad" / "cache.db"))
    disk_cache.share_disk_cache()
    assert keeps() and caplog.text.count("are not kept for the next start") == 1


def test_without_a_home_directory_nothing_is_written_below_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "CACHEDB", str(tmp_path / "~" / ".cache" / "tinygrad" / "cache.db"))
    disk_cache.share_disk_cache()
    assert keeps() and not (tmp_path / "~").exists()


def test_a_damaged_file_leaves_the_cache_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache.db"
    path.write_bytes(b"not a database" * 1000)
    monkeypatch.setattr(helpers, "CACHEDB", str(path))
    disk_cache.share_disk_cache()
    assert keeps()


@pytest.mark.parametrize("pragma", ["query_only = ON", "max_page_count = 1"], ids=["read-only", "full"])
def test_a_write_that_fails_is_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pragma: str
) -> None:
    monkeypatch.setattr(helpers, "CACHEDB", str(tmp_path / "cache.db"))
    disk_cache.share_disk_cache()
    assert keeps("before") and not caplog.records
    sqlite3.Cursor(helpers._db_connection).execute(f"PRAGMA {pragma}")
    with caplog.at_level(logging.WARNING):
        helpers.diskcache_put("table", "large", bytes(100_000))
        assert not keeps("after") and helpers.diskcache_get("table", "before") == [1, 2]
    assert caplog.text.count("are not kept any more") == 1
