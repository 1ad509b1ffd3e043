"""Find the files of a model on disk, given a path, or the catalog name or hub id that was pulled."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tinyvllm.config import MODELS_DIR_VARIABLE, ModelFiles, home_dir
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.catalog import CATALOG
from tinyvllm.storage.regular_file import entries_of, is_present, is_regular, open_regular
from tinyvllm.storage.strict_json import read_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SPLIT_FILE = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
GGUF_MAGIC = b"GGUF"
PROJECTOR = "mmproj"  # how names of GGUF files begin that hold the vision part of a model
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class InstalledModel:
    """A model in the models directory. `name` is the argument for resolve_model."""

    name: str
    kind: str  # as in ModelFiles
    path: Path
    num_bytes: int
    problem: str = ""  # why it cannot be used, as far as its first bytes or its config.json tell


def models_dir() -> Path:
    """The directory of pulled models: $TINYVLLM_MODELS, or ./models in a checkout of tinyvllm, or the user's cache."""
    if chosen := os.environ.get(MODELS_DIR_VARIABLE):
        return Path(chosen).expanduser()
    here = Path.cwd()
    if (here / "tinyvllm" / "storage").is_dir() and (here / "models" / "README.md").is_file():
        return here / "models"
    return home_dir() / ".cache" / "tinyvllm" / "models"


def resolve_model(name_or_path: str, models_dir: Path | None = None) -> ModelFiles:
    """The files of a model: an existing path takes precedence over a pulled model of that name.

    Raises ModelError, with the command that downloads the model if there is one.
    """
    path = Path(name_or_path).expanduser()
    if _exists(path):
        return _at_path(path, path.stem if path.suffix.lower() == ".gguf" else path.resolve().name)
    if looks_like_path(name_or_path):
        raise ModelError(
            f"there is no file or directory {name_or_path}: check the path, or give a name from `tinyvllm models`"
        )
    models_dir = _or_default(models_dir)
    place = installed_path(name_or_path, models_dir)
    if _exists(place):
        return _at_path(place, name_or_path)
    for other in (models_dir / f"{name_or_path}.gguf", models_dir / name_or_path):  # placed there by hand
        if _exists(other):
            return _at_path(other, name_or_path)
    if is_pullable(name_or_path):
        raise ModelError(f"model {name_or_path} is not in {models_dir}: run `tinyvllm pull {name_or_path}`")
    raise ModelError(
        f"{unknown_name(name_or_path)}, a hub id (org/name), a .gguf file or a directory with config.json and "
        "safetensors"
    )


def list_models(models_dir: Path | None = None) -> list[InstalledModel]:
    """The models that resolve_model can find by name, sorted by name. Damaged ones are listed with their problem.
    Raises ModelError if the directory cannot be read."""
    models_dir = _or_default(models_dir)
    found: list[InstalledModel] = []
    for path in entries_of(models_dir) if models_dir.is_dir() else []:
        split = SPLIT_FILE.fullmatch(path.name)
        if path.name.startswith(".") or (split and split["number"] != "00001"):
            continue
        if path.suffix == ".gguf":
            parts = [path]
            if split is not None:
                pattern = f"{glob.escape(split['stem'])}-*-of-{split['count']}.gguf"
                parts = sorted(models_dir.glob(pattern))
            found.append(InstalledModel(path.stem, "gguf", path, _num_bytes(parts), _problem_of(_check_gguf, path)))
        elif path.is_dir() and (is_present(path / "config.json") or not os.access(path, os.R_OK | os.X_OK)):
            name, problem = path.name.replace("--", "/", 1), _problem_of(_check_directory, path)
            found.append(InstalledModel(name, "hf", path, _num_bytes([] if problem else entries_of(path)), problem))
    return found


def _num_bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if is_regular(path))


def _problem_of(check: Callable[[Path], object], path: Path) -> str:
    try:
        check(path)
    except ModelError as error:
        return str(error)
    return ""


def _check_gguf(path: Path) -> None:
    with open_regular(path) as file:
        start = file.read(len(GGUF_MAGIC))
    if start != GGUF_MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it begins with {start!r}")


def _check_directory(path: Path) -> None:
    entries_of(path)
    read_json(path / "config.json")


def _exists(path: Path) -> bool:
    """Whether there is a file or directory. A name that is too long names none, nor does a broken link."""
    try:
        return path.exists()
    except OSError:
        return False


def _or_default(directory: Path | None) -> Path:
    return directory or models_dir()


def installed_path(name: str, models_dir: Path) -> Path:
    """Where `pull` places a catalog name (a file) or a hub id (a directory)."""
    return models_dir / (name.replace("/", "--", 1) if HUB_ID.fullmatch(name) else f"{name}.gguf")


def is_pullable(name: str) -> bool:
    """True for catalog names and for names in the form of a hub id."""
    return name in CATALOG or HUB_ID.fullmatch(name) is not None


def looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.endswith(".gguf") or name.count("/") > 1


def unknown_name(name: str) -> str:
    """The beginning of an error: the name, a similar one of a model that exists, and the catalog's names."""
    similar = difflib.get_close_matches(name, {*CATALOG, *(model.name for model in list_models(models_dir()))}, n=1)
    meant = f" (did you mean {similar[0]!r}?)" if similar else ""
    return f"there is no model {name!r}{meant}: give a catalog name ({', '.join(CATALOG)})"


def _at_path(path: Path, name: str) -> ModelFiles:
    """The model at `path`. Raises ModelError if there is none."""
    if path.is_dir():
        if is_present(path / "config.json"):
            return ModelFiles("hf", path, name)
        return _only_gguf_file(path, name)
    if path.suffix.lower() == ".gguf":
        return ModelFiles("gguf", path, name)
    if path.suffix in PICKLE_SUFFIXES:
        raise UnsupportedModelError(
            f"{path} is a pickle file, which can run code when it is read: convert it to safetensors or GGUF"
        )
    raise UnsupportedModelError(f"{path} is not a .gguf file: give a .gguf file or a directory in Hugging Face format")


def _only_gguf_file(directory: Path, name: str) -> ModelFiles:
    """The model of a directory with GGUF files, which tools that download such files make. Raises ModelError if there
    are several or none."""
    found = []
    for path in entries_of(directory):
        split = SPLIT_FILE.fullmatch(path.name)
        is_first = split is None or int(split["number"]) == 1
        if path.suffix.lower() == ".gguf" and is_first and not path.name.lower().startswith(PROJECTOR):
            found.append(path)
    if len(found) == 1:
        return ModelFiles("gguf", found[0], name)
    if found:
        names = ", ".join(path.name for path in found)
        raise ModelError(f"{directory} has several .gguf files: give one of them ({names})")
    raise ModelError(f"{directory} has no config.json: give a directory in Hugging Face format, or a .gguf file")
