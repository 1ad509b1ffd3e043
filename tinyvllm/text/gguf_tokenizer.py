"""Build a tokenizer from GGUF metadata: byte-level BPE (`gpt2`), SentencePiece's score-based BPE (`llama`), or
SentencePiece's pieces with a list of merges (`gemma4`).

Keys and token types: https://github.com/ggml-org/ggml/blob/9d325133eed396b7bf005a53a83d9747cbd8bde1/docs/gguf.md
(section "Tokenizer"). Defaults for missing keys follow llama.cpp, which wrote most of these files:
https://github.com/ggml-org/llama.cpp/blob/00ad355e009e83abf98f96a6ded7193b95763681/src/llama-vocab.cpp
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.text.pre_tokenizers import find_pre_tokenizer
from tinyvllm.text.tokenizer_spec import SPACE_MARK, TokenizerSpec, byte_level_bytes, sentencepiece_bytes

MODELS = ("gpt2", "llama", "gemma4")  # values of tokenizer.ggml.model
LINES = r"[^\n]+|[\n]+"  # of `gemma4`: line breaks are apart from everything else

# Texts that end a turn or a document. Files name one EOS, but a chat model has two or three: Llama 3 ends a turn with
# <|eot_id|> and a document with <|end_of_text|>. llama.cpp stops at these too, and also at code completion tokens
# (<reponame> in SmolLM2), which do not end a chat's turn and are omitted here. Some converters type them as NORMAL;
# they are special all the same, because no text contains them by accident.
END_TEXTS = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<turn|>",
        "<end_of_utterance>",
        "<EOT>",
        "[EOT]",
        "<｜end▁of▁sentence｜>",
    }
)
# These end a document where they are special tokens, but may be ordinary text: markup, or words of a code vocabulary
PLAIN_END_TEXTS = frozenset({"</s>", "<eos>", "[EOS]", "<|observation|>"})  # the last: GLM's, after its calls


class TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """The lists of a GGUF file's metadata, in the order of ids."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]  # of two tokens with the same text, the later one's

    @property
    def doubled(self) -> dict[int, str]:
        """Texts of the tokens that `ids` does not lead to, because a later token has the same text."""
        return {token_id: text for token_id, text in enumerate(self.tokens) if self.ids[text] != token_id}

    def of_type(self, *types: TokenType) -> list[int]:
        return [token_id for token_id, token_type in enumerate(self.types) if token_type in types]


def read_gguf_tokenizer(metadata: Mapping[str, Any]) -> TokenizerSpec:
    """Build a tokenizer. Raises UnsupportedModelError for an unknown kind, ModelError for invalid metadata."""
    kind = require(metadata, "tokenizer.ggml.model")
    vocabulary = read_vocabulary(metadata, may_repeat=kind == "gemma4")
    if kind == "gpt2":
        pre_tokenizer = find_pre_tokenizer(metadata.get("tokenizer.ggml.pre", "default"))
        merges = read_merges(metadata, vocabulary)
        model = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre_tokenizer.ignore_merges)
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizer.build()
        to_bytes, add_bos, add_space = byte_level_bytes, pre_tokenizer.add_bos, False
    elif kind == "llama":
        add_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend = tokenizers.Tokenizer(make_score_bpe(metadata, vocabulary))
        # the space is prepended to every segment of text, so after each special token too
        prepend = [normalizers.Prepend(SPACE_MARK)] if add_space else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE_MARK)])
        to_bytes, add_bos = sentencepiece_bytes, True
    elif kind == "gemma4":
        backend = tokenizers.Tokenizer(make_merged_bpe(metadata, vocabulary))
        backend.normalizer = normalizers.Replace(" ", SPACE_MARK)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(LINES), behavior="isolated")
        to_bytes, add_bos, add_space = sentencepiece_bytes, True, False
    else:
        raise UnsupportedModelError(f"tokenizer.ggml.model is {kind!r}, which is not known; known: {', '.join(MODELS)}")

    bos_id, eos_id, eos_ids = read_ends(metadata, vocabulary)
    rstripped = rstripped_texts(metadata, vocabulary)
    add_added_tokens(backend, vocabulary, {*eos_ids, *([] if bos_id is None else [bos_id])}, rstripped)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    return TokenizerSpec(
        backend=backend,
        to_bytes=to_bytes,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=eos_ids,
        prefix_ids=(check_id("tokenizer.ggml.bos_token_id", bos_id, vocabulary),) if add_bos else (),
        suffix_ids=(check_id("tokenizer.ggml.eos_token_id", eos_id, vocabulary),) if add_eos else (),
        strips_leading_space=add_space,
        fim_ids=read_fim_ids(metadata, vocabulary),
        doubled=vocabulary.doubled,
    )


def read_special_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens that chat templates use: bos_token, eos_token and unk_token, if they exist."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    found = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown")):
        token_id = special_id(metadata, key)
        if token_id is not None and token_id < len(tokens):
            found[name] = str(tokens[token_id])
    return found


def require(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise ModelError(f"the GGUF file has no {key}, so its tokenizer cannot be built: convert the model again")
    return metadata[key]


def read_vocabulary(metadata: Mapping[str, Any], *, may_repeat: bool = False) -> Vocabulary:
    """The vocabulary. `may_repeat`: several tokens may have the same text; Gemma 4 has three such pairs."""
    raw_tokens = require(metadata, "tokenizer.ggml.tokens")
    # an empty text cannot be looked up; these are llama.cpp's names for them
    tokens = [str(token) or f"[EMPTY_{token_id}]" for token_id, token in enumerate(raw_tokens)]
    types = [int(token_type) for token_type in metadata.get("tokenizer.ggml.token_type", [])] or [
        int(TokenType.NORMAL)
    ] * len(tokens)
    check_length("tokenizer.ggml.token_type", len(types), len(tokens))
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) < len(tokens) and not may_repeat:
        double = next(token for token_id, token in enumerate(tokens) if ids[token] != token_id)
        raise ModelError(f"tokenizer.ggml.tokens contains {double!r} more than once: tokens must be unique")
    return Vocabulary(tokens, types, ids)


def check_length(key: str, length: int, expected: int) -> None:
    if length != expected:
        raise ModelError(f"{key} has {length} entries, but tokenizer.ggml.tokens has {expected}: they must match")


# --- Models ----------------------------------------------------------------------------------------------


def read_merges(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The pairs of tokens that are merged, the most frequent first. Raises ModelError."""
    merges = []
    for rank, line in enumerate(require(metadata, "tokenizer.ggml.merges")):
        left, space, right = line[1:].partition(" ")  # from the second character: the first may be a space
        left = line[:1] + left
        if not (space and right and {left, right, left + right} <= vocabulary.ids.keys()):
            raise ModelError(f"tokenizer.ggml.merges[{rank}] is {line!r}, which is not two tokens that form a third")
        merges.append((left, right))
    return merges


def make_merged_bpe(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> models.BPE:
    """SentencePiece's pieces, whose merges are listed. A character without a piece becomes its bytes."""
    return models.BPE(
        vocab=vocabulary.ids,
        merges=read_merges(metadata, vocabulary),
        unk_token=unknown_text(metadata, vocabulary),
        fuse_unk=True,
        byte_fallback=True,
    )


def make_score_bpe(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> models.BPE:
    """SentencePiece's BPE: of all adjacent pairs whose joint text is a piece, merge the best-scoring piece first."""
    scores = [float(score) for score in require(metadata, "tokenizer.ggml.scores")]
    check_length("tokenizer.ggml.scores", len(scores), len(vocabulary.tokens))
    # control, unknown and byte tokens cannot be produced from text, as in SentencePiece
    pieces = vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    return models.BPE(
        vocab=vocabulary.ids,
        merges=rank_merges({vocabulary.tokens[token_id]: scores[token_id] for token_id in pieces}),
        unk_token=unknown_text(metadata, vocabulary),
        fuse_unk=True,
        byte_fallback=True,
    )


def unknown_text(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> str | None:
    """The text of the unknown token, if there is one."""
    unk_id = special_id(metadata, "unknown")
    return vocabulary.tokens[unk_id] if unk_id is not None and unk_id < len(vocabulary.tokens) else None


def rank_merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All (left, right) pairs of pieces that form a piece, ordered by the score of the whole, best first.

    SentencePiece breaks ties by position, leftmost first, but a list of merges needs a fixed order: ties are in the
    order of `scores`, which is that of the ids, first of the whole piece, then of its halves.
    """
    order = {piece: index for index, piece in enumerate(scores)}
    pairs: list[tuple[str, str]] = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        halves = [
            (left, right)
            for cut in range(1, len(piece))
            if (left := piece[:cut]) in order and (right := piece[cut:]) in order
        ]
        if len(halves) > 1:  # most have one, and Gemma has 262,144 pieces
            halves.sort(key=lambda pair: (order[pair[0]], order[pair[1]]))
        pairs += halves
    return pairs


# --- Special tokens --------------------------------------------------------------------------------------


def special_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """The value of tokenizer.ggml.<name>_token_id. Defaults of `llama` files: <unk> 0, <s> 1, </s> 2."""
    defaults = {"unknown": 0, "bos": 1, "eos": 2} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
    return None if token_id is None else int(token_id)


def read_ends(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[int | None, int | None, frozenset[int]]:
    """(bos_id, eos_id, eos_ids). An id outside the vocabulary is ignored, as in llama.cpp."""
    num_tokens = len(vocabulary.tokens)
    stated = {name: special_id(metadata, name) for name in ("bos", "eos", "eot", "eom")}
    valid = {name: token_id for name, token_id in stated.items() if token_id is not None and token_id < num_tokens}
    special = set(vocabulary.of_type(TokenType.CONTROL, TokenType.USER_DEFINED))
    ends = {vocabulary.ids[text] for text in END_TEXTS if text in vocabulary.ids}
    ends |= {vocabulary.ids[text] for text in PLAIN_END_TEXTS if vocabulary.ids.get(text) in special}
    if "<turn|>" in vocabulary.ids:  # Gemma 4, whose tool calls end with the mark of the answer, and whose </s> is HTML
        ends |= {vocabulary.ids[text] for text in ("<|tool_response>",) if text in vocabulary.ids}
        ends.discard(vocabulary.ids.get("</s>", -1))
    if {"<|return|>", "<|call|>"} <= vocabulary.ids.keys():  # Harmony format: <|end|> ends a message, not a turn
        ends.discard(vocabulary.ids.get("<|end|>", -1))
        ends |= {vocabulary.ids["<|return|>"], vocabulary.ids["<|call|>"]}
    eos_ids = ends | {token_id for name, token_id in valid.items() if name != "bos"}
    return valid.get("bos"), valid.get("eos"), frozenset(eos_ids)


def read_fim_ids(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, int]:
    """The ids for filling in the middle that the file names, under llama.cpp's keys or its older ones."""
    keys = {
        "prefix": ("fim_pre", "prefix"),
        "suffix": ("fim_suf", "suffix"),
        "middle": ("fim_mid", "middle"),
        "pad": ("fim_pad",),
        "rep": ("fim_rep",),
        "sep": ("fim_sep",),
    }
    found = {}
    for name, spellings in keys.items():
        ids = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in spellings)
        token_id = next((int(one) for one in ids if one is not None), None)
        if token_id is not None and token_id < len(vocabulary.tokens):
            found[name] = token_id
    return found


def add_added_tokens(
    backend: tokenizers.Tokenizer, vocabulary: Vocabulary, always_special: Iterable[int], rstripped: Collection[str]
) -> None:
    """Add the tokens that are matched before all others: special ones (control, unknown) and user-defined ones.
    `rstripped`: those that take the whitespace after them."""
    special = {*vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN), *always_special}
    plain = set(vocabulary.of_type(TokenType.USER_DEFINED)) - special
    for ids, is_special in ((special, True), (plain, False)):
        texts = (vocabulary.tokens[token_id] for token_id in sorted(ids))
        backend.add_tokens(
            [
                tokenizers.AddedToken(text, special=is_special, normalized=False, rstrip=text in rstripped)
                for text in texts
            ]
        )


def rstripped_texts(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> frozenset[str]:
    """Texts of the added tokens that take the whitespace after them: Phi-3's. GGUF does not say so; as llama.cpp, by
    the model's name."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    added = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    texts = {vocabulary.tokens[token_id] for token_id in added} | {"</s>"}
    return frozenset(texts - {"<unk>", "<s>", "<|endoftext|>"})


def check_id(key: str, token_id: int | None, vocabulary: Vocabulary) -> int:
    if token_id is None:
        raise ModelError(f"the tokenizer adds {key}, which is missing or not below {len(vocabulary.tokens)}")
    return token_id
