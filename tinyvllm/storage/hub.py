"""The Hugging Face hub: which of a repository's files we read, and how to download them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from tinyvllm.errors import DownloadError, UnsupportedModelError

WANTED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)


@dataclass(frozen=True)
class HubFile:
    """One file of a repository. `sha256` is known for large files only."""

    name: str
    num_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The files that we read from a repository, at one commit."""

    repo_id: str
    commit: str
    files: tuple[HubFile, ...]


def list_files(repo_id: str) -> Listing:
    """Query the hub. Raises DownloadError if that fails, UnsupportedModelError if the format is not supported."""
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, files_metadata=True)
    except Exception as error:  # from the hub, its HTTP client or the network, which share no base class
        raise _failure(repo_id, error) from error
    files = []
    for sibling in info.siblings or []:
        if is_wanted(sibling.rfilename):
            files.append(HubFile(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None))
    names = {file.name for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise UnsupportedModelError(
            f"{repo_id} has no config.json with *.safetensors at its top level (pickle files are not read): "
            "choose a repository that has both, or download a .gguf file of the model and pass its path"
        )
    return Listing(repo_id, info.sha or "main", tuple(files))


def is_wanted(name: str) -> bool:
    """Whether a file belongs to the configuration, the tokenizer or the weights in safetensors format."""
    return name in WANTED or (name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated"))


def download(listing: Listing, directory: Path) -> None:
    """Download a listing's files into `directory`. Raises DownloadError."""
    # here, because servers import this file, and the hub's progress bars take 15 to 70 ms
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # `pull` reports progress itself
    try:
        huggingface_hub.snapshot_download(
            listing.repo_id,
            revision=listing.commit,
            local_dir=directory,
            allow_patterns=[file.name for file in listing.files],
        )
    except Exception as error:  # as in list_files
        raise _failure(listing.repo_id, error) from error
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # the client's metadata


def _failure(repo_id: str, error: Exception) -> DownloadError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2]) or type(error).__name__  # the status and the hub's message
    return DownloadError(
        f"cannot download {repo_id} from the hub: {reason} (check the name and the network; "
        "for gated models accept the license on the model's page and set HF_TOKEN)"
    )
