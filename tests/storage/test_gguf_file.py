"""The header reader against the gguf package's writer, and against files that are cut, damaged or split."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.builders import GGUFTweaks, byte_vocabulary, write_tiny_gguf
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.gguf_file import GGUFFile

VALUES = {
    "test.text": "héllo 世界",
    "test.integer": -7,
    "test.number": 0.5,
    "test.yes": True,
    "test.words": ["", "a b", "é"],
    "test.counts": [1, -2, 3],
    "test.shares": [0.25, 1.5],
}


def write_split(directory: Path, num_parts: int) -> Path:
    """One tensor a part, named t0, t1, ...; returns the first part's path."""
    for number in range(num_parts):
        path = directory / f"tiny-{number + 1:05}-of-{num_parts:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", num_parts)
        writer.add_tensor(f"t{number}", np.full((2, 3), number, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return directory / f"tiny-00001-of-{num_parts:05}.gguf"


def test_metadata_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = GGUFFile(write_tiny_gguf(tmp_path / "m.gguf", tweaks=GGUFTweaks(metadata=VALUES)).path)
    assert {key: file.metadata[key] for key in VALUES} == VALUES
    assert file.metadata["tokenizer.ggml.tokens"] == byte_vocabulary()
    assert file.metadata["general.architecture"] == "llama"


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q4_1", "Q8_0"])
def test_tensors_are_where_the_gguf_package_finds_them(tmp_path: Path, quant: str) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", quant=quant).path
    expected = gguf.GGUFReader(path).tensors
    tensors = GGUFFile(path).tensors
    assert list(tensors) == [tensor.name for tensor in expected]
    for tensor in expected:
        ours = tensors[tensor.name]
        assert ours.ggml_type == tensor.tensor_type.name
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(ours.data, np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8))


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", layers=1).path
    assert GGUFFile(path).metadata is GGUFFile(path).metadata
    write_tiny_gguf(path, layers=2)
    assert GGUFFile(path).metadata["llama.block_count"] == 2


def test_a_file_cut_anywhere_says_so(tmp_path: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "m.gguf", layers=1, vocab=300).path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [1, 3, 6, 20, 100, len(whole) // 2, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 40)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf is (cut short or damaged: it has \d+ bytes|not a GGUF)"):
            GGUFFile(cut)


def test_random_damage_to_the_header_is_never_another_kind_of_error(tmp_path: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "m.gguf", layers=1).path.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    rng = random.Random(1)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(3):
            content[rng.randrange(12_000)] = rng.randrange(256)
        damaged.write_bytes(content)
        try:
            GGUFFile(damaged)
        except ModelError as error:
            assert "damaged.gguf" in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: download it again"),
        (b"<html>not found</html>", "is not a GGUF file: it begins with b'<htm'"),
        (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
        (b"tjgg" + bytes(32), "a format of ggml from before GGUF"),
        (b"GGUF\x01\0\0\0" + bytes(16), "has GGUF version 1, which is not supported; known: 2 and 3"),
        (b"GGUF\0\0\0\x03" + bytes(16), "big-endian"),
    ],
)
def test_what_is_no_readable_gguf_file_is_named(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        GGUFFile(path)


def test_unknown_tensor_type_lists_the_known(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", layers=1).path
    content = path.read_bytes()
    name = b"output_norm.weight"
    type_at = content.index(name) + len(name) + 4 + 8  # one dimension's count and length come between
    path.write_bytes(content[:type_at] + (999).to_bytes(4, "little") + content[type_at + 4 :])
    with pytest.raises(UnsupportedModelError, match=r"output_norm\.weight has type number 999.*known: F32, F16"):
        GGUFFile(path)


def test_split_model_is_read_from_its_first_part(tmp_path: Path) -> None:
    file = GGUFFile(write_split(tmp_path, 3))
    assert list(file.tensors) == ["t0", "t1", "t2"]
    assert file.tensors["t2"].data.view(np.float32).tolist() == [2.0] * 6


def test_split_model_is_read_from_any_part_under_names_of_either_case(tmp_path: Path) -> None:
    first = write_split(tmp_path, 3)
    third = GGUFFile(tmp_path / "tiny-00003-of-00003.gguf")
    assert list(third.tensors) == ["t0", "t1", "t2"]
    assert third.metadata["split.no"] == 0
    for part in tmp_path.iterdir():
        part.rename(part.with_name(part.name.upper()))
    assert list(GGUFFile(first.with_name(first.name.upper())).tensors) == ["t0", "t1", "t2"]


def test_split_model_may_be_links_to_files_of_other_names(tmp_path: Path) -> None:
    """As the hub's cache has it: names are links, and contents lie under their hashes."""
    first = write_split(tmp_path, 2)
    (tmp_path / "blobs").mkdir()
    for part in sorted(tmp_path.glob("*.gguf")):
        blob = part.rename(tmp_path / "blobs" / part.name[5:10])
        part.symlink_to(blob)
    assert list(GGUFFile(first).tensors) == ["t0", "t1"]
    # and a link that someone made to the first part
    (tmp_path / "mine.gguf").symlink_to(first.name)
    with pytest.raises(ModelError, match="one of 2 parts, which must be called"):
        GGUFFile(tmp_path / "mine.gguf")  # its target is the blob
    alone = tmp_path / "alone"
    alone.mkdir()
    write_split(alone, 2)
    (tmp_path / "other.gguf").symlink_to(alone / first.name)
    assert list(GGUFFile(tmp_path / "other.gguf").tensors) == ["t0", "t1"]


def test_split_model_says_which_part_is_missing_or_how_parts_are_called(tmp_path: Path) -> None:
    first = write_split(tmp_path, 3)
    (tmp_path / "tiny-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match=r"its directory lacks tiny-00002-of-00003\.gguf"):
        GGUFFile(first)
    with pytest.raises(ModelError, match=r"must be called NAME-00001-of-00003\.gguf"):
        GGUFFile(first.rename(tmp_path / "renamed.gguf"))


def test_a_tensor_that_comes_twice_is_named(tmp_path: Path) -> None:
    first = write_split(tmp_path, 2)
    second = tmp_path / "tiny-00002-of-00002.gguf"
    second.write_bytes(second.read_bytes().replace(b"t1", b"t0"))
    with pytest.raises(ModelError, match=r"00002\.gguf has tensor t0, which another part has too"):
        GGUFFile(first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=r"00002\.gguf is part 1 by its metadata, but 2 by its name"):
        GGUFFile(first)
    path = write_tiny_gguf(tmp_path / "m.gguf", layers=2).path
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(ModelError, match=r"has tensor blk\.0\.attn_q\.weight twice"):
        GGUFFile(path)


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file .*none\.gguf"):
        GGUFFile(tmp_path / "none.gguf")
