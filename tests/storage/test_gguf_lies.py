"""GGUF files with impossible values: each is refused by name, before anything is built from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_tiny_gguf
from tests.fuzz.gguf_image import ARRAY, STRING, Image, TensorInfo, Value, parse
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError
from tinyvllm.model.weights.gguf import read_gguf
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.model_config import read_generation_defaults, read_model_config
from tinyvllm.storage.model_summary import summarize
from tinyvllm.text.chat import load_chat_template
from tinyvllm.text.tokenizer import load_tokenizer

U8, U32, I32, F32, BOOL, U64 = 0, 4, 5, 6, 7, 10


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return parse(write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", layers=1).path.read_bytes())


def write(folder: Path, image: Image) -> ModelFiles:
    path = folder / "m.gguf"
    path.write_bytes(image.to_bytes())
    return ModelFiles("gguf", path, "m")


def with_tensor(image: Image, **changes: Any) -> Image:
    """With another second tensor."""
    first, second, *others = image.tensors
    return replace(image, tensors=[first, replace(second, **changes), *others])


HEADERS: dict[str, tuple[Callable[[Image], Image], str]] = {
    "keys": (lambda i: replace(i, num_values=2**64 - 1), r"states 18446744073709551615 keys.*at most 65536"),
    "tensors": (lambda i: replace(i, num_tensors=2**63), r"states 9223372036854775808 tensors.*at most 262144"),
    "dims": (lambda i: with_tensor(i, num_dims=2**32 - 1), r"tensor \S+ has 4294967295 dimensions.*at most 4"),
    "no_rows": (lambda i: with_tensor(i, lengths=(64, 0)), r"tensor \S+ has a dimension of 0"),
    "overflow": (lambda i: with_tensor(i, lengths=(2**32, 2**32)), r"damaged: it has \d+ bytes, but tensor \S+ ends"),
    "shared": (lambda i: with_tensor(i, offset=i.tensors[0].offset), r"begins at offset 0, inside tensor token_embd"),
    "inside": (lambda i: with_tensor(i, offset=i.tensors[1].offset - 32), r"begins at offset \d+, inside tensor"),
    "unaligned": (
        lambda i: replace(i, tensors=[*i.tensors, TensorInfo(b"x", (1,), 0, len(i.data) + 4)], data=i.data + bytes(8)),
        r"tensor x begins at offset \d+, not a multiple of 32",
    ),
    "key_twice": (lambda i: replace(i, values=[*i.values, i.values[0]]), r"has the key '[\w.]+' twice"),
    "lists": (lambda i: i.with_value(b"a.b", Value(ARRAY, [], ARRAY, 1)), r"'a\.b' is a list of lists"),
    "unknown_type": (lambda i: i.with_value(b"a.b", Value(99, 0)), r"'a\.b' is of type number 99"),
    "long_list": (lambda i: i.with_value(b"a", Value(ARRAY, [], U8, 2**62)), r"'a' is a list of \d+ items.*at most"),
    "long_key": (lambda i: i.with_value(b"k" * 70_000, Value(U32, 0)), r"a text in its header has 70000 bytes"),
    "alignment": (lambda i: i.with_value(b"general.alignment", Value(U32, 48)), r"alignment is 48.*a power of two"),
    "alignments": (lambda i: i.with_value(b"general.alignment", Value(ARRAY, [32], U32)), r"alignment is \[32\]"),
    "split": (lambda i: i.with_value(b"split.count", Value(F32, 2.0)), r"split\.count is 2\.0: it must be a whole"),
    "splits": (lambda i: i.with_value(b"split.count", Value(U64, 10**9)), r"split\.count is 1000000000.*at most 65535"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_by_name(tmp_path: Path, image: Image, name: str) -> None:
    lie, message = HEADERS[name]
    begin = time.process_time()
    with pytest.raises(ModelError, match=rf"m\.gguf.*{message}"):
        GGUFFile(write(tmp_path, lie(image)).path)
    assert time.process_time() - begin < 1


def test_a_part_of_a_split_model_states_its_number(tmp_path: Path, image: Image) -> None:
    whole = image.with_value(b"split.count", Value(U32, 2))
    for number, tensors in ((1, image.tensors), (2, [])):
        part = replace(whole.with_value(b"split.no", Value(STRING, b"1")), tensors=tensors)
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(part.to_bytes())
    with pytest.raises(ModelError, match=r"00002-of-00002\.gguf: split\.no is '1': it must be a whole number"):
        GGUFFile(tmp_path / "m-00001-of-00002.gguf")


def test_a_tensor_without_dimensions_is_a_number(tmp_path: Path, image: Image) -> None:
    scalar = TensorInfo(b"scalar", (), 0, len(image.data))
    found = replace(image, tensors=[*image.tensors, scalar], data=image.data + bytes(32))
    assert GGUFFile(write(tmp_path, found).path).tensors["scalar"].shape == (1,)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a pipe"), ("folder", "a directory"), ("device", "a device")):
        with pytest.raises(ModelError, match=rf"{name}\.gguf: it is {kind}, and a model's files must be regular"):
            GGUFFile(tmp_path / f"{name}.gguf")
    with pytest.raises(ModelError, match="there is no file"):
        GGUFFile(tmp_path / f"{'long' * 1000}.gguf")


CONFIGS: dict[str, tuple[bytes, Value, str]] = {
    "layers": (b"llama.block_count", Value(U32, 2**31), r"block_count is 2147483648.*at most 1024"),
    "heads": (b"llama.attention.head_count", Value(ARRAY, [4] * 2, U32), r"head_count is \[4, 4\]"),
    "context": (b"llama.context_length", Value(U64, 2**64 - 1), r"context_length is 18446744073709551615"),
    "eps": (b"llama.attention.layer_norm_rms_epsilon", Value(F32, float("nan")), r"layer_norm_rms_epsilon is nan"),
    "eps_tiny": (
        b"llama.attention.layer_norm_rms_epsilon",
        Value(F32, 1e-45),
        r"layer_norm_rms_epsilon is 1\.4\S+: it must be 0, or",
    ),
    "width": (b"llama.embedding_length", Value(U32, 2**31 - 1), r"embedding_length is 2147483647.*at most 16777216"),
    "theta": (b"llama.rope.freq_base", Value(F32, 1.0), r"freq_base is 1\.0: it must be a number of at least 2"),
    "factor": (b"llama.rope.scaling.factor", Value(F32, 1e30), r"factor is 1\S+: it must be a number that.*1e\+06"),
    "window": (b"llama.attention.sliding_window_pattern", Value(ARRAY, [b"y"], STRING), r"_pattern is \['y'\]"),
    "pooling": (b"llama.pooling_type", Value(STRING, b"mean"), r"pooling_type is 'mean'"),
    "architecture": (b"general.architecture", Value(ARRAY, [b"llama"], STRING), r"architecture is \['llama'\]"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_setting_of_another_type_or_beyond_bounds_is_refused_by_name(tmp_path: Path, image: Image, name: str) -> None:
    key, value, message = CONFIGS[name]
    narrow = image.with_value(b"llama.attention.sliding_window", Value(U32, 16))
    with pytest.raises(ModelError, match=rf"m\.gguf: [\w.]+{message}"):
        read_model_config(write(tmp_path, narrow.with_value(key, value)))


def test_a_rope_that_divides_by_zero_is_refused(tmp_path: Path, image: Image) -> None:
    divisors = TensorInfo(b"rope_freqs.weight", (8,), 0, len(image.data))
    files = write(tmp_path, replace(image, tensors=[*image.tensors, divisors], data=image.data + bytes(32)))
    with pytest.raises(ModelError, match=r"rope_freqs\.weight must hold finite numbers of at least 1e-06"):
        read_model_config(files)


def test_a_token_without_a_row_of_the_embedding_is_refused(tmp_path: Path, image: Image) -> None:
    tokens = dict(image.values)[b"tokenizer.ggml.tokens"]
    more = image.with_value(b"tokenizer.ggml.tokens", replace(tokens, item=[*tokens.item, b"more"]))
    with pytest.raises(ModelError, match=r"tokens has 261 entries, but token_embd\.weight has 260 rows"):
        load_tokenizer(write(tmp_path, more))


def test_a_chat_template_that_takes_long_to_parse_is_refused(tmp_path: Path, image: Image) -> None:
    long = image.with_value(b"tokenizer.chat_template", Value(STRING, b"{{ messages }}" * 100_000))
    with pytest.raises(ModelError, match=r"chat template 'default' of m has 1400000 characters: it must have at most"):
        load_chat_template(write(tmp_path, long))


def test_two_tensors_for_one_matrix_are_refused(tmp_path: Path, image: Image) -> None:
    files = write(tmp_path, with_tensor(image, name=b"model.embed_tokens.weight"))
    with pytest.raises(ModelError, match=r"two tensors are model\.embed_tokens\.weight"):
        read_gguf(files.path, read_model_config(files))


def test_numbers_that_json_lacks_are_left_out_of_summaries(tmp_path: Path, image: Image) -> None:
    for number in (float("nan"), float("inf")):
        strange = image.with_value(b"general.a", Value(F32, number)).with_value(b"a.b", Value(ARRAY, [number], F32))
        info = summarize(write(tmp_path, strange)).info
        assert (info["general.a"], info["a.b"]) == (None, [None])


def test_what_lists_of_models_and_requests_take_from_a_file_is_checked(tmp_path: Path, image: Image) -> None:
    files = write(tmp_path, image.with_value(b"general.file_type", Value(ARRAY, [1], U32)))
    with pytest.raises(ModelError, match=r"general\.file_type is \[1\]"):
        summarize(files)
    files = write(tmp_path, image.with_value(b"general.sampling.temp", Value(STRING, b"hot")))
    with pytest.raises(ModelError, match=r"general\.sampling\.temp is 'hot'"):
        read_generation_defaults(files)
    files = write(tmp_path, image.with_value(b"tokenizer.ggml.eot_token_id", Value(U32, 2**32 - 1)))
    assert read_generation_defaults(files).eos_ids == (258,)  # files in use state such ids
