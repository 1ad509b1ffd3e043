"""What we ask of the hub's client, which is replaced here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from tinyvllm.errors import DownloadError, UnsupportedModelError
from tinyvllm.storage import hub

LFS = SimpleNamespace(sha256="ab" * 32)


def repository(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The hub has one repository, with these files."""
    siblings = [
        SimpleNamespace(rfilename=name, size=10, lfs=LFS if name.endswith(".safetensors") else None) for name in names
    ]
    info = SimpleNamespace(sha="0123abc", siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo_id, files_metadata: info)


def test_only_what_we_read_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    unwanted = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/model.safetensors",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "README.md",
        "evil.py",
    ]
    repository(monkeypatch, *wanted, *unwanted)
    listing = hub.list_files("org/name")
    assert [file.name for file in listing.files] == wanted
    assert listing.commit == "0123abc"
    assert {file.name: file.sha256 for file in listing.files}["config.json"] is None
    assert {file.name: file.sha256 for file in listing.files}["model-00001-of-00002.safetensors"] == LFS.sha256


@pytest.mark.parametrize("names", [("config.json", "pytorch_model.bin"), ("model.safetensors",), ("x.gguf",)])
def test_repository_without_our_format_is_refused(monkeypatch: pytest.MonkeyPatch, names: Any) -> None:
    repository(monkeypatch, *names)
    with pytest.raises(
        UnsupportedModelError, match=r"org/name has no config\.json with \*\.safetensors.*download a \.gguf"
    ):
        hub.list_files("org/name")


def test_download_asks_for_the_listed_files_at_the_listed_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: Any, **options: Any) -> None:
        asked.update(options, repo_id=repo_id)
        (options["local_dir"] / ".cache").mkdir(parents=True)
        (options["local_dir"] / "config.json").write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.download(hub.Listing("org/name", "0123abc", (hub.HubFile("config.json", 2, None),)), tmp_path / "model")
    assert (asked["repo_id"], asked["revision"], asked["allow_patterns"]) == ("org/name", "0123abc", ["config.json"])
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


def test_failures_of_the_client_become_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("404 Client Error.\n\nRepository Not Found\nand more lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    message = r"org/name from the hub: 404 Client Error\. Repository Not Found \(check the name.*HF_TOKEN"
    with pytest.raises(DownloadError, match=message):
        hub.list_files("org/name")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError, match="404 Client Error"):
        hub.download(hub.Listing("org/name", "0123abc", ()), tmp_path)
