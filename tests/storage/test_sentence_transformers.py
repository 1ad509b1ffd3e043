"""What an embedding model's own files say of its pooling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.sentence_transformers import read_pooling

LAST = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}


def write(directory: Path, pooling: dict[str, Any], *more: str) -> Path:
    kinds = ("Transformer", "Pooling", "Normalize", *more)
    modules = [{"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"x.{kind}"} for i, kind in enumerate(kinds)]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return directory


def test_each_mode_is_read_in_either_spelling(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    assert read_pooling(write(tmp_path, LAST)) == "last"
    assert read_pooling(write(tmp_path, {"pooling_mode_mean_tokens": True})) == "mean"
    assert read_pooling(write(tmp_path, {"pooling_mode": "cls"})) == "cls"


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode_max_tokens": True}, LAST | {"pooling_mode_cls_token": True}, {"pooling_mode": "max"}, {}]
)
def test_other_modes_are_refused(tmp_path: Path, pooling: dict[str, Any]) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"1_Pooling/config\.json: pooling .* known: pooling_mode_lasttoken"
    ):
        read_pooling(write(tmp_path, pooling))


def test_other_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"module 'x\.Dense'"):
        read_pooling(write(tmp_path, LAST, "Dense"))
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an object, but must hold a JSON list"):
        read_pooling(tmp_path)
