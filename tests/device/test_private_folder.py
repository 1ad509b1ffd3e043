"""What is kept on disk comes back whole or not at all, and only from where nobody else can write."""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
from pathlib import Path

import pytest

from tinyvllm.config import cache_dir
from tinyvllm.device.private_folder import PrivateFolder
from tinyvllm.errors import CacheError, TinyvllmError


def write_raw(path: Path, payload: bytes) -> None:
    """A file with a right checksum over whatever bytes."""
    path.write_bytes(hashlib.sha256(payload).digest() + payload)
    path.chmod(0o600)


def test_a_value_comes_back_in_another_folder_object_of_the_same_key(tmp_path: Path) -> None:
    value = {"a": (1, 2.5, b"code", None)}
    PrivateFolder(tmp_path, "key").write("name", value)
    assert PrivateFolder(tmp_path, "key").read("name") == value


def test_another_key_or_name_has_nothing(tmp_path: Path) -> None:
    PrivateFolder(tmp_path, "key").write("name", 1)
    assert PrivateFolder(tmp_path, "key").read("other") is None
    assert PrivateFolder(tmp_path, "other").read("name") is None


def test_folders_and_files_are_the_users_alone(tmp_path: Path) -> None:
    PrivateFolder(tmp_path / "root", "key").write("name", 1)
    for path, mode in ((tmp_path / "root" / "key", 0o700), (tmp_path / "root" / "key" / "name", 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_ignored_and_deleted(tmp_path: Path, damage: str) -> None:
    folder = PrivateFolder(tmp_path, "key")
    folder.write("name", list(range(1000)))
    path = tmp_path / "key" / "name"
    content = path.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    path.write_bytes({"cut": content[:-100], "flipped": flipped, "empty": b""}[damage])
    assert folder.read("name") is None
    assert not path.exists()
    folder.write("name", 2)
    assert folder.read("name") == 2


@pytest.mark.parametrize(
    "value",
    [os.system, print, Path("x"), TinyvllmError("x")],
    ids=["os.system", "print", "a foreign class", "a class of ours"],
)
def test_a_file_that_names_anything_else_is_refused(tmp_path: Path, value: object) -> None:
    folder = PrivateFolder(tmp_path, "key")
    write_raw(tmp_path / "key" / "name", pickle.dumps(value, protocol=5))
    assert folder.read("name") is None


def test_a_gadget_does_not_run(tmp_path: Path) -> None:
    class Gadget:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was-run"),)

    folder = PrivateFolder(tmp_path, "key")
    write_raw(tmp_path / "key" / "name", pickle.dumps(Gadget(), protocol=5))
    assert folder.read("name") is None
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("which", ["root", "key folder"])
def test_a_folder_that_others_can_write_is_refused_with_the_remedy(tmp_path: Path, which: str) -> None:
    root = tmp_path / "root"
    PrivateFolder(root, "key")
    folder = root if which == "root" else root / "key"
    folder.chmod(0o777)
    with pytest.raises(CacheError, match=rf"can be written by others \(mode 777\): chmod go-w {folder}"):
        PrivateFolder(root, "key")


def test_a_folder_of_another_user_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PrivateFolder(tmp_path, "key")
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(CacheError, match=r"belongs to user .*, not to you .*: delete it, or name another"):
        PrivateFolder(tmp_path, "key")


def test_a_link_is_followed_neither_to_a_folder_nor_to_a_file(tmp_path: Path) -> None:
    folder = PrivateFolder(tmp_path / "root", "key")
    folder.write("name", 1)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "root" / "key")
    with pytest.raises(CacheError, match="symbolic link"):
        PrivateFolder(tmp_path / "root", "link")
    (tmp_path / "root" / "key" / "alias").symlink_to(tmp_path / "root" / "key" / "name")
    assert folder.read("alias") is None
    assert folder.read("name") == 1


def test_a_file_that_others_can_write_is_not_read(tmp_path: Path) -> None:
    folder = PrivateFolder(tmp_path, "key")
    folder.write("name", 1)
    (tmp_path / "key" / "name").chmod(0o666)
    assert folder.read("name") is None


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    with pytest.raises(CacheError, match="cannot be used"):
        PrivateFolder(tmp_path / "root", "key")


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"TINYVLLM_CACHE": "x", "XDG_CACHE_HOME": "y"}, "TINYVLLM_CACHE"),
        ({"XDG_CACHE_HOME": "y"}, "XDG_CACHE_HOME"),
        ({}, "TINYVLLM_CACHE"),
    ],
)
def test_the_hint_names_the_variable_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], named: str
) -> None:
    for variable in ("TINYVLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(CacheError, match=rf"name another folder in {named}$"):
        PrivateFolder(tmp_path, "key")


def test_a_user_without_a_home_directory_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("TINYVLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(CacheError, match="this-user-has-no-home-directory"):
        PrivateFolder(cache_dir(), "key")


def test_a_value_that_cannot_be_written_is_only_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = PrivateFolder(tmp_path, "key")
    monkeypatch.setattr(os, "replace", full)
    for name in ("name", "another"):
        folder.write(name, 1)
    assert caplog.text.count("cannot be kept") == 1
    assert list((tmp_path / "key").iterdir()) == []
    assert folder.read("name") is None


def test_trimming_drops_what_was_used_longest_ago_of_all_keys(tmp_path: Path) -> None:
    old, new = PrivateFolder(tmp_path, "old"), PrivateFolder(tmp_path, "new")
    for folder, name, age_s in ((old, "a", 40), (new, "b", 30), (new, "c", 20), (new, "d", 10)):
        folder.write(name, bytes(1000))
        path = folder.folder / name
        os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    assert new.read("b") is not None  # and so it is the newest
    new.trim(max_bytes=2500)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["b", "d"]
    assert not (tmp_path / "old").exists()
