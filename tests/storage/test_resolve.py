"""Which files a model's name means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_tiny_gguf, write_tiny_hf_llama
from tinyvllm.config import MODELS_DIR_VARIABLE, ModelFiles
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.catalog import CATALOG, DEFAULT_MODEL
from tinyvllm.storage.resolve import installed_path, list_models, models_dir, resolve_model


def test_a_path_is_used_as_it_is(tmp_path: Path) -> None:
    file, directory = write_tiny_gguf(tmp_path / "tiny.gguf"), write_tiny_hf_llama(tmp_path / "hf")
    assert resolve_model(str(file.path)) == ModelFiles("gguf", file.path, "tiny")
    assert resolve_model(str(directory.path)) == ModelFiles("hf", directory.path, "hf")


def test_a_relative_path_is_named_by_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_hf_llama(tmp_path / "hf")
    monkeypatch.chdir(tmp_path / "hf")
    assert resolve_model(".") == ModelFiles("hf", Path("."), "hf")


def test_pulled_models_are_found_by_the_name_they_were_pulled_by(tmp_path: Path) -> None:
    write_tiny_gguf(installed_path(DEFAULT_MODEL, tmp_path))
    write_tiny_hf_llama(installed_path("some-org/tiny.llama", tmp_path))
    assert resolve_model(DEFAULT_MODEL, tmp_path).path == tmp_path / f"{DEFAULT_MODEL}.gguf"
    assert resolve_model("some-org/tiny.llama", tmp_path).path == tmp_path / "some-org--tiny.llama"
    assert resolve_model("some-org/tiny.llama", tmp_path).name == "some-org/tiny.llama"


def test_models_put_there_by_hand_are_found_by_their_name(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "mine.gguf")
    write_tiny_hf_llama(tmp_path / "other")
    assert resolve_model("mine", tmp_path).kind == "gguf"
    assert resolve_model("other", tmp_path).kind == "hf"


def test_every_listed_model_resolves_to_itself(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "a.gguf")
    write_tiny_gguf(tmp_path / "b-00001-of-00002.gguf")
    (tmp_path / "b-00002-of-00002.gguf").write_bytes(bytes(100))
    write_tiny_hf_llama(tmp_path / "org--name")
    (tmp_path / ".pull-left").mkdir()
    (tmp_path / "README.md").write_text("text")
    models = list_models(tmp_path)
    assert [model.name for model in models] == ["a", "b-00001-of-00002", "org/name"]
    assert models[1].num_bytes == models[1].path.stat().st_size + 100
    assert [resolve_model(model.name, tmp_path).path for model in models] == [model.path for model in models]
    assert list_models(tmp_path / "none") == []


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "org/name"])
def test_what_can_be_pulled_but_is_not_there_names_the_command(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ModelError, match=f"run `tinyvllm pull {name}`"):
        resolve_model(name, tmp_path)


def test_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"there is no model 'smol'.*{DEFAULT_MODEL}"):
        resolve_model("smol", tmp_path)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "none.gguf", "a/b/c"])
def test_what_looks_like_a_path_is_an_absent_file_and_not_a_hub_id(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="no file or directory"):
        resolve_model(name, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(
        UnsupportedModelError, match=r"pickle file, which can run code.*convert it to safetensors or GGUF"
    ):
        resolve_model(str(tmp_path / name))


def test_other_files_and_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match=r"not a \.gguf file"):
        resolve_model(str(tmp_path / "model.onnx"))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_models_directory_is_the_variable_then_the_checkout_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MODELS_DIR_VARIABLE, str(tmp_path / "chosen"))
    assert models_dir() == tmp_path / "chosen"
    monkeypatch.delenv(MODELS_DIR_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert models_dir() == tmp_path / ".cache" / "tinyvllm" / "models"
    (tmp_path / "tinyvllm" / "storage").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "README.md").write_text("what goes here")
    assert models_dir() == tmp_path / "models"


def test_catalog_names_are_no_hub_ids() -> None:
    assert all("/" not in name for name in CATALOG)
    assert DEFAULT_MODEL in CATALOG


def test_damaged_models_are_listed_with_their_problem(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "good.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GG")
    (tmp_path / "pipe.gguf").symlink_to("/dev/zero")
    (tmp_path / "gone.gguf").symlink_to("nowhere")
    for name, config in {"fine": "{}", "broken": "{", "list": "[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "model.safetensors").symlink_to("nowhere")
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "config.json")
    problems = {model.name: model.problem for model in list_models(tmp_path)}
    assert set(problems) == {"good", "cut", "pipe", "gone", "fine", "broken", "list", "fifo"}
    assert {name for name, problem in problems.items() if not problem} == {"good", "fine"}
    for name, problem in problems.items():
        assert not problem or f"/{name}" in problem
    assert "it is a pipe" in problems["fifo"] and "not a GGUF file" in problems["cut"]


def test_a_name_that_no_file_can_have_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model"):
        resolve_model("a" * 5000, tmp_path)
