"""What an output may replace, and what is left when it cannot be written."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.builders import write_tiny_gguf, write_tiny_hf_llama
from tinyvllm.config import ModelFiles
from tinyvllm.convert.destination import remove
from tinyvllm.convert.quantize import quantize
from tinyvllm.convert.targets import parse_target
from tinyvllm.errors import ModelError
from tinyvllm.storage.model_config import read_model_config


def convert(source: ModelFiles, to: str, path: Path, *, force: bool = True) -> None:
    quantize(source, parse_target(to), path, lambda done, total: None, force=force)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> ModelFiles:
    return write_tiny_hf_llama(tmp_path / "models" / "hf", hidden=64)


@pytest.fixture
def gguf(tmp_path: Path) -> ModelFiles:
    return write_tiny_gguf(tmp_path / "models" / "source.gguf", quant="Q8_0", hidden=64)


def test_what_holds_the_source_is_never_replaced(tmp_path: Path, source: ModelFiles, gguf: ModelFiles) -> None:
    linked = tmp_path / "linked"  # a source whose files are elsewhere, as in a cache
    linked.mkdir()
    for path in source.path.iterdir():
        (linked / path.name).symlink_to(path)
    before = contents(tmp_path)
    for one, to, out, text in (
        (source, "mlx-4", source.path, "is the source itself"),
        (source, "mlx-4", source.path.parent, "contains the source"),
        (source, "mlx-4", tmp_path / "new" / ".." / "models", "contains the source"),
        (source, "q8_0", source.path / "model.safetensors", "is the source itself"),
        (source, "q8_0", source.path / "x.gguf", "is inside the source"),
        (source, "mlx-4", source.path / "out" / "mlx", "is inside the source"),
        (ModelFiles("hf", linked, "x"), "mlx-4", source.path, "contains the source"),
        (gguf, "q4_0", gguf.path, "is the source itself"),
        (gguf, "mlx-4", gguf.path.parent, "contains the source"),
    ):
        with pytest.raises(ModelError, match=f"{text}.*: give another --out"):
            convert(one, to, out)
    assert contents(tmp_path) == before and not (source.path / "out").exists()


def test_only_a_model_of_the_same_kind_is_replaced(tmp_path: Path, source: ModelFiles, gguf: ModelFiles) -> None:
    places = {name: tmp_path / name for name in ("empty", "photos", "project", "nested")}
    for path in places.values():
        path.mkdir()
    (places["photos"] / "a.jpg").write_bytes(b"x")
    for name in ("project", "nested"):
        shutil.copytree(source.path, places[name], dirs_exist_ok=True)
    (places["project"] / "train.py").write_text("x")
    (places["nested"] / "onnx").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    before = contents(tmp_path)
    for to, out, text in (
        ("mlx-4", places["empty"], "empty is not a model directory"),
        ("fp8", places["photos"], "photos is not a model directory"),
        ("mlx-4", places["project"], "project has train.py, which is not part of a model"),
        ("mlx-4", places["nested"], "nested has onnx, which is not part of a model"),
        ("mlx-4", tmp_path / "notes.txt", "notes.txt is a file, but the output is a directory"),
        ("mlx-4", gguf.path, "source.gguf is a file, but the output is a directory"),
        ("q8_0", places["photos"], "photos is a directory, but the output is a GGUF file"),
        ("q8_0", tmp_path / "notes.txt", "notes.txt is not a GGUF file"),
        ("q8_0", Path("/dev/null"), "/dev/null is not a GGUF file"),
    ):
        with pytest.raises(ModelError, match=text):
            convert(source, to, out)
    assert contents(tmp_path) == before and not Path("/dev/null").is_file()


def test_a_model_is_replaced_by_another(tmp_path: Path, source: ModelFiles) -> None:
    path = tmp_path / "out"
    convert(source, "mlx-4", path)
    (path / "LICENSE").write_text("x")  # of an earlier source
    convert(source, "fp8", path)
    assert read_model_config(ModelFiles("hf", path, "x")) and not (path / "LICENSE").exists()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["models", "out"]


def test_a_symbolic_link_is_refused_before_converting(tmp_path: Path, source: ModelFiles) -> None:
    path, link = tmp_path / "out", tmp_path / "link"
    convert(source, "mlx-4", path)
    for target in (path, tmp_path / "nowhere"):
        remove(link)
        link.symlink_to(target)
        for to in ("mlx-4", "q8_0"):
            with pytest.raises(ModelError, match=f"link is a symbolic link to {target}: give that as --out"):
                convert(source, to, link)
    assert (path / "config.json").is_file() and not (tmp_path / "nowhere").exists()


@contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """Let no file grow above a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, source: ModelFiles) -> None:
    (tmp_path / "file").write_text("x")
    long = "x" * 255
    for to in ("mlx-4", "q8_0"):
        out = tmp_path / "large"
        with (
            pytest.raises(ModelError, match=r"large cannot be written: File too large.*: raise the limit"),
            limited(5000),
        ):
            convert(source, to, out)
        for path, text in (
            (tmp_path / "file" / "x", "Not a directory|File exists"),
            (tmp_path / long, "name too long"),
        ):
            with pytest.raises(ModelError, match=f"cannot be written: .*({text}).*: give another --out"):
                convert(source, to, path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "models"]


def test_the_old_output_stays_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, source: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that appears beside the old output while it is converted is kept as well."""
    path = tmp_path / "out"
    convert(source, "mlx-4", path)
    before = contents(path)

    def add_a_file(done: int, total: int) -> None:
        (path / "notes.py").write_text("x")

    with pytest.raises(ModelError, match=r"out has notes.py, which is not part of a model"):
        quantize(source, parse_target("mlx-8"), path, add_a_file, force=True)
    assert contents(path) == before | {str(path / "notes.py"): b"x"}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["models", "out"]
