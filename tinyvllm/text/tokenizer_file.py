"""tokenizer.json, checked before the tokenizers library sees it.

The library checks types strictly, but it trusts values. Some values make it abort, which ends the process: a token of a
million characters overflows the stack of the Unigram model, and replacements that multiply a text, or a table that
claims to have gigabytes, exhaust the memory. Others make it loop. So each part with such a value is checked here, and
the library gets a file that is assembled from the checked parts. The vocabulary and the merges are passed on unchanged:
the time and memory for reading them are proportional to their size.

What a check cannot decide is tried: a file with a pattern that may backtrack endlessly is first loaded in a process of
its own, which may die (`CheckedFile.risk`).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.regular_file import read_regular
from tinyvllm.storage.strict_json import parse_json
from tinyvllm.storage.values import MAX_SIZE, Values, is_integer, shown
from tinyvllm.text.regex_risk import MAX_PATTERN, find_risk

MAX_TOKENIZER_BYTES = 1 << 28  # of tokenizer.json; the largest known have 35 MB
MAX_TOKEN_TEXT = 4096  # characters; the longest known token has about 1000, of Unigram vocabularies 16
MAX_ADDED_TOKENS = 1 << 18
MAX_PART_BYTES = 1 << 22  # of a normalizer, ...; the largest known, tables of SentencePiece, have 0.4 MB
MAX_PARTS = 64  # of a normalizer, a pre-tokenizer, ...; the most known are 8
MAX_BYTE_LEVELS = 2  # each doubles what is not ASCII
MAX_GROWTH = 256  # by which normalizing may multiply a text
MAX_INSERTED = 64  # characters that are put before each word; token ids that are put around a text
MAX_WORD = 10_000  # characters of a word that WordPiece looks up, in quadratic time; usually 100

Text = Annotated[str, msgspec.Meta(max_length=MAX_TOKEN_TEXT)]
Inserted = Annotated[str, msgspec.Meta(max_length=MAX_INSERTED)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SIZE)]
NULL = msgspec.Raw(b"null")


class _Model(msgspec.Struct, omit_defaults=True):
    """Everything that the library's four models read. `vocab` and `merges` are JSON that is not parsed."""

    vocab: msgspec.Raw
    merges: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    type: str | None = None
    dropout: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    unk_token: Text | None = None
    continuing_subword_prefix: Inserted | None = None
    end_of_word_suffix: Inserted | None = None
    fuse_unk: bool | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None
    max_input_chars_per_word: Annotated[int, msgspec.Meta(ge=0, le=MAX_WORD)] | None = None
    unk_id: TokenId | None = None


class _AddedToken(msgspec.Struct):
    id: TokenId
    content: Text
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _File(msgspec.Struct):
    model: _Model
    added_tokens: Annotated[list[_AddedToken], msgspec.Meta(max_length=MAX_ADDED_TOKENS)] = []
    normalizer: msgspec.Raw = NULL
    pre_tokenizer: msgspec.Raw = NULL
    post_processor: msgspec.Raw = NULL
    decoder: msgspec.Raw = NULL


# Made at import: msgspec gathers a Struct's fields at its first use, and two threads that do so at once crash it.
_decode_file = msgspec.json.Decoder(_File).decode


def _check_merges(path: Path, model: _Model) -> None:
    """With a `continuing_subword_prefix`, the library cuts that many bytes off the second part of a merge without
    checking them. The rest may not be UTF-8, and the library aborts when it reports that such a token is unknown."""
    prefix = model.continuing_subword_prefix
    if not prefix or isinstance(model.merges, msgspec.UnsetType):
        return
    for merge in msgspec.json.decode(model.merges, type=list[str | tuple[str, str]]):
        second = merge.partition(" ")[2] if isinstance(merge, str) else merge[1]
        if not second.startswith(prefix):
            raise ModelError(
                f"{path}: the merge {shown(merge)} does not go on with the continuing_subword_prefix {prefix!r}"
            )


@dataclass(frozen=True)
class Kinds:
    """The kinds of one of the file's parts. `checks`: by kind; None: nothing about it can do harm."""

    sequence_key: str  # of a Sequence's parts
    checks: Mapping[str, Callable[[_Check, Values], None] | None]


@dataclass(frozen=True)
class CheckedFile:
    """`data`: the file as the library may read it, without truncation and padding, which files may have on. `risk`: why
    it has to be tried in a process of its own first, or ""."""

    data: bytes
    risk: str


def read_tokenizer_file(path: Path) -> CheckedFile:
    """Read and check a tokenizer.json. Raises ModelError, UnsupportedModelError for unknown kinds of parts."""
    data = read_regular(path, MAX_TOKENIZER_BYTES)
    try:
        file = _decode_file(data)
        if bytes(memoryview(file.model.vocab)[:1]) == b"[":  # of a Unigram model
            msgspec.json.decode(file.model.vocab, type=list[tuple[Text, float]])
        _check_merges(path, file.model)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a valid tokenizer: {error}") from error
    except RecursionError:
        raise ModelError(f"{path} is not a valid tokenizer: it is nested too deep") from None
    check = _Check(path)
    whole = [b'{"version":"1.0","added_tokens":', msgspec.json.encode(file.added_tokens)]
    for name, kinds in PARTS.items():
        whole += [b',"%s":' % name.encode(), check.part(name, getattr(file, name), kinds)]
    return CheckedFile(b"".join([*whole, b',"model":', msgspec.json.encode(file.model), b"}"]), check.risk)


class _Check:
    """The parts of one file, and what they do together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.risk = ""
        self.num_parts = 0
        self.num_byte_levels = 0
        self.num_added_ids = 0
        self.growth = 1.0

    def part(self, name: str, stated: msgspec.Raw, kinds: Kinds) -> bytes:
        """Check one of the file's parts; returns its JSON."""
        num_bytes = len(memoryview(stated))
        if num_bytes > MAX_PART_BYTES:
            raise ModelError(f"{self.path}: {name} has {num_bytes} bytes, but may have at most {MAX_PART_BYTES}")
        value = parse_json(bytes(stated), f"{name} of {self.path}")
        part = Values(self.path, {name: value}).inner(name)
        if part is not None:
            self.visit(part, kinds)
        return json.dumps(value).encode()

    def visit(self, part: Values, kinds: Kinds) -> None:
        """Check a part by the table of its kinds; a sequence is a part of further ones."""
        self.num_parts += 1
        if self.num_parts > MAX_PARTS:
            raise UnsupportedModelError(f"{self.path} has more than {MAX_PARTS} normalizers, pre-tokenizers, ...")
        kind = part.choice("type", ("Sequence", *kinds.checks))
        if kind == "Sequence":
            for inner in part.inners(kinds.sequence_key):
                self.visit(inner, kinds)
        elif (check := kinds.checks[kind]) is not None:
            check(self, part)

    def grow(self, values: Values, key: str, factor: float) -> None:
        self.growth *= max(factor, 1.0)
        if self.growth > MAX_GROWTH:
            values.refuse(key, f"shorter: together, normalizers multiply a text by more than {MAX_GROWTH}")

    def pattern(self, values: Values) -> tuple[str, bool]:
        """(a part's pattern, whether it is a regular expression)."""
        place = values.inner("pattern")
        if place is None:
            values.refuse("pattern", "an object with a String or a Regex")
        if place.get("Regex") is None:
            return place.text("String"), False
        text = place.text("Regex")
        if len(text) > MAX_PATTERN:
            place.refuse("Regex", f"at most {MAX_PATTERN} characters")
        risk = find_risk(text)
        if risk:
            self.risk = f"{place.name('Regex')} is {shown(text)}, which {risk}"
        return text, True

    def add_ids(self, values: Values, key: str, count: int) -> None:
        self.num_added_ids += count
        if self.num_added_ids > MAX_INSERTED:
            values.refuse(key, f"a template that adds at most {MAX_INSERTED} ids to a text")


# --- Checks of single parts ------------------------------------------------------------------------------------------


def _byte_level(check: _Check, values: Values) -> None:
    check.num_byte_levels += 1
    if check.num_byte_levels > MAX_BYTE_LEVELS:
        values.refuse("type", f"in a file at most {MAX_BYTE_LEVELS} times")


def _replace(check: _Check, values: Values) -> None:
    text, is_regex = check.pattern(values)
    content = values.text("content", "")
    # an expression may match nothing, and put the content between all characters
    check.grow(values, "content", len(content) + 1 if is_regex else len(content) / max(len(text), 1))


def _replace_tokens(check: _Check, values: Values) -> None:
    """A part of a decoder, which is never run here."""
    check.pattern(values)


def _prepend(check: _Check, values: Values) -> None:
    if len(values.text("prepend", "")) > MAX_INSERTED:
        values.refuse("prepend", f"at most {MAX_INSERTED} characters")


def _split(check: _Check, values: Values) -> None:
    check.pattern(values)


def _fixed_length(check: _Check, values: Values) -> None:
    values.integer("length")


def _precompiled(check: _Check, values: Values) -> None:
    """SentencePiece's table of replacements: a trie's size in bytes, the trie, and texts that end with a zero byte.

    https://github.com/google/sentencepiece/blob/d8f741853847553169444afc12c00f4bbff3e9ce/src/normalizer.cc#L237
    """
    stated = values.text("precompiled_charsmap")
    try:
        blob = base64.b64decode(stated, validate=True)
    except (binascii.Error, ValueError):
        values.refuse("precompiled_charsmap", "base64")
    size = int.from_bytes(blob[:4], "little")
    if len(blob) < 4 or size > len(blob) - 4:
        values.refuse("precompiled_charsmap", "as long as its first four bytes say")
    texts = blob[4 + size // 4 * 4 :]
    check.grow(values, "precompiled_charsmap", max(map(len, texts.split(b"\0"))) / 4)


def _template(check: _Check, values: Values) -> None:
    tokens = values.inner("special_tokens") or Values(values.source, {})
    counts = {}
    for name in tokens.values:
        token = tokens.inner(name)
        counts[name] = 0 if token is None else len(_ids(token, "ids"))
    for key in ("single", "pair"):
        names = [inner.text("id") for piece in values.inners(key) if (inner := piece.inner("SpecialToken")) is not None]
        check.add_ids(values, key, sum(counts.get(name, 0) for name in names))


def _ids(values: Values, key: str) -> list[int]:
    ids = values.get(key)
    if not isinstance(ids, list) or not all(is_integer(item, 0, MAX_SIZE - 1) for item in ids):
        values.refuse(key, f"a list of token ids below {MAX_SIZE}")
    return ids


def _ends(check: _Check, values: Values) -> None:
    """Of BERT's and RoBERTa's templates: a text and an id for each end."""
    for key in ("sep", "cls"):
        pair = values.get(key)
        if not isinstance(pair, list) or len(pair) != 2 or not is_integer(pair[1], 0, MAX_SIZE - 1):
            values.refuse(key, f"a text and its token id, below {MAX_SIZE}")


PARTS = {
    "normalizer": Kinds(
        "normalizers",
        {"ByteLevel": _byte_level, "Replace": _replace, "Prepend": _prepend, "Precompiled": _precompiled}
        | dict.fromkeys(("Bert", "BertNormalizer", "Strip", "StripAccents", "Lowercase", "Nmt"))
        | dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD")),
    ),
    "pre_tokenizer": Kinds(
        "pretokenizers",
        {"ByteLevel": _byte_level, "Split": _split, "FixedLength": _fixed_length}
        | dict.fromkeys(("BertPreTokenizer", "Delimiter", "CharDelimiterSplit", "Metaspace", "Punctuation", "Digits"))
        | dict.fromkeys(("Whitespace", "WhitespaceSplit", "UnicodeScripts")),
    ),
    "post_processor": Kinds(
        "processors",
        {"ByteLevel": None, "TemplateProcessing": _template, "BertProcessing": _ends, "RobertaProcessing": _ends},
    ),
    "decoder": Kinds(
        "decoders",
        {"Replace": _replace_tokens}
        | dict.fromkeys(("BPEDecoder", "ByteLevel", "WordPiece", "Metaspace", "CTC", "Fuse", "Strip", "ByteFallback")),
    ),
}
