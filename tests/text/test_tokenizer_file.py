"""A tokenizer.json that would make the tokenizers library abort, loop or panic is refused, by the name of its part.

Each case ended the process, or raised a panic, which is not an Exception, when the library read the file unchecked."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.builders import make_byte_tokenizer, write_byte_tokenizer
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError
from tinyvllm.text import tokenizers_library
from tinyvllm.text.regex_risk import find_risk
from tinyvllm.text.tokenizer import load_tokenizer
from tinyvllm.text.tokenizer_file import CheckedFile, read_tokenizer_file


def charsmap(blob: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def template(num_ids: int, num_pieces: int) -> dict[str, Any]:
    token = {"id": "x", "ids": [1] * num_ids, "tokens": ["x"] * num_ids}
    pieces = [{"SpecialToken": {"id": "x", "type_id": 0}}] * num_pieces
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {"x": token}}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a" * 400_000, -1.0]]}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"model": UNIGRAM}, "length <= 4096"),  # the stack overflows when the trie is freed
    ({"normalizer": {"type": "Sequence", "normalizers": [replace("a" * 1000, String="a")] * 5}}, "multiply a text by"),
    ({"normalizer": replace("a" * 1000, Regex="")}, "multiply a text by"),
    ({"normalizer": charsmap(b"\xff\xff\xff\xff" + b"a" * 100)}, "as long as its first four bytes say"),
    ({"normalizer": charsmap(b"\0\0\0\0" + b"a" * 10_000)}, "multiply a text by"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "must be base64"),
    ({"normalizer": {"type": "Prepend", "prepend": "a" * 100}}, "at most 64 characters"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 40}}, "at most 2 times"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}] * 100}}, "more than 64"),
    ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "length is 0"),
    ({"pre_tokenizer": {"type": "Spaceship"}}, "'Spaceship', which is not supported; known: Sequence, ByteLevel"),
    ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a" * 10_000}}}, "at most 8192 characters"),
    ({"post_processor": template(30, 3)}, "adds at most 64 ids to a text"),
    ({"post_processor": template(600_000, 1)}, "post_processor has .* bytes, but may have at most"),
    ({"post_processor": {"type": "BertProcessing", "sep": ["a", -1], "cls": ["b", 1]}}, "a text and its token id"),
    ({"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "a" * 10_000}}, "length <= 64"),
    ({"added_tokens": [{"id": 2**40, "content": "x"}]}, r"Expected `int` <= 16777215 - at `\$.added_tokens\[0\].id`"),
    # the library aborts while it reports a token that is not UTF-8
    (
        {"model": {"type": "BPE", "continuing_subword_prefix": "a", "vocab": {"é": 0}, "merges": ["é é"]}},
        "the merge 'é é'",
    ),
    ({"decoder": []}, "decoder is .*must be an object"),
]


@pytest.mark.parametrize(("changes", "message"), CASES)
def test_parts_that_would_end_the_process_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(make_byte_tokenizer().to_str()) | changes), encoding="utf-8")
    with pytest.raises(ModelError, match=f"tokenizer.json.*{message}"):
        read_tokenizer_file(path)


def test_a_panic_of_the_library_is_a_model_error(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["added_tokens"] = [stored["added_tokens"][0] | {"content": " ", "normalized": True}]
    stored["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a valid tokenizer: AddedVocabulary bad split"):
        load_tokenizer(ModelFiles("hf", tmp_path, "tiny"))


def test_a_checked_file_is_the_librarys_own(tmp_path: Path) -> None:
    backend = make_byte_tokenizer()
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    file = read_tokenizer_file(path)
    assert not file.risk
    assert tokenizers_library.load(path, file).to_str() == backend.to_str()


def test_a_file_with_a_risk_is_tried_in_another_process(tmp_path: Path) -> None:
    stored = json.loads(make_byte_tokenizer().to_str())
    path = tmp_path / "tokenizer.json"

    def load(pattern: str) -> None:
        stored["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        path.write_text(json.dumps(stored), encoding="utf-8")
        file = read_tokenizer_file(path)
        assert file.risk
        tokenizers_library.load(path, file)

    load(r"(?:\w+ ?)+")
    with pytest.raises(ModelError, match=r"repeats what has a repeat in it, and .* cannot use it: .*retry-limit"):
        load(r"(?:\w+\w+)+$")
    deadly = CheckedFile(b'{"version":"1.0","model":' + json.dumps(UNIGRAM).encode() + b"}", "has a risk")
    with pytest.raises(ModelError, match="has a risk, and the tokenizers library ends with signal"):
        tokenizers_library.load(path, deadly)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(a|b+)*",
        "(?:a{1000}){1000}",
        "a{100000}",
        "a{1000000000000}",
        "(" * 17 + ")" * 17,
        r"(a)\1",
        "(?x)a",
        "[",
        "a*" * 9,
    ],
)
def test_patterns_that_may_backtrack_without_end_are_risks(pattern: str) -> None:
    assert find_risk(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+",
        r"[\p{Lu}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t)?",
        r"[!\"#\[\]]+|[^]\\]*|(?<=\d)(?=\d{3}+)?",
        " {2,}",
        r"[一-龥]+",
    ],
)
def test_patterns_of_known_models_are_not_risky(pattern: str) -> None:
    assert not find_risk(pattern)


DECODE_AT_ONCE = """
import json, sys, threading
sys.setswitchinterval(1e-6)
from tinyvllm.text.tokenizer_file import read_tokenizer_file
from pathlib import Path
barrier = threading.Barrier(4)

def read():
    barrier.wait()
    read_tokenizer_file(Path(sys.argv[1]))

threads = [threading.Thread(target=read) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_may_read_their_first_file_at_once(tmp_path: Path) -> None:
    """As an engine's process does, for the model and for grammars: one start in four crashed in msgspec."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {}, "merges": []}, "added_tokens": []}))
    for _ in range(6):
        done = subprocess.run([sys.executable, "-c", DECODE_AT_ONCE, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
