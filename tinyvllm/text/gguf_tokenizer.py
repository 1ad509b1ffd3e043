"""Build a tokenizer from GGUF metadata: byte-level BPE (`gpt2`), SentencePiece's score-based BPE (`llama`), or
SentencePiece's pieces with a list of merges (`gemma4`).

Keys and token types: https://github.com/ggml-org/ggml/blob/9d325133eed396b7bf005a53a83d9747cbd8bde1/docs/gguf.md
(section "Tokenizer"). Defaults for missing keys follow llama.cpp, which wrote most of these files:
https://github.com/ggml-org/llama.cpp/blob/00ad355e009e83abf98f96a6ded7193b95763681/src/llama-vocab.cpp
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from tinyvllm.errors import ModelError
from tinyvllm.storage.gguf_keys import token_id_below
from tinyvllm.storage.values import Values, shown
from tinyvllm.text.pre_tokenizers import PRE_TOKENIZERS
from tinyvllm.text.tokenizer_spec import SPACE_MARK, TokenizerSpec, byte_level_bytes, sentencepiece_bytes
from tinyvllm.text.tokenizers_library import failures_as

logger = logging.getLogger(__name__)

PREFIX = "tokenizer.ggml."
IN_MEMORY = Path("the GGUF metadata")  # the name in messages of metadata that was not read from a file
MODELS = ("gpt2", "llama", "gemma4")  # values of tokenizer.ggml.model
DAMAGED = "\ufffd"  # what readers put in place of bytes that are not UTF-8
MAX_PIECE = 1024  # characters of a scored piece, of which every cut is tried; SentencePiece's own limit is 16
MAX_MERGES = 1 << 21  # of scored pieces: Gemma 3 has 514,847
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
        if len(self.ids) == len(self.tokens):
            return {}
        return {token_id: text for token_id, text in enumerate(self.tokens) if self.ids[text] != token_id}

    def of_type(self, *types: TokenType) -> list[int]:
        return [token_id for token_id, token_type in enumerate(self.types) if token_type in types]


def read_gguf_tokenizer(
    metadata: Mapping[str, Any], source: Path = IN_MEMORY, num_rows: int | None = None
) -> TokenizerSpec:
    """Build a tokenizer. `source`: the file, for messages. `num_rows`: of the embedding, which has one for each token.
    Raises UnsupportedModelError for an unknown kind, ModelError for metadata that is missing or makes no sense."""
    num_tokens = len(Values(source, metadata, PREFIX).texts("tokens"))
    if num_rows is not None and num_tokens > num_rows:
        raise ModelError(
            f"{source}: {PREFIX}tokens has {num_tokens} entries, but token_embd.weight has {num_rows} rows: there must "
            "be a row for each token"
        )
    with failures_as(lambda text: ModelError(f"{source} has a vocabulary that cannot be used: {text}")):
        return _read(metadata, source)


def _read(metadata: Mapping[str, Any], source: Path) -> TokenizerSpec:
    values = Values(source, metadata, PREFIX)
    kind = values.choice("model", MODELS)
    vocabulary = read_vocabulary(metadata, source, may_repeat=kind == "gemma4")
    if kind == "gpt2":
        pre_tokenizer = PRE_TOKENIZERS[values.choice("pre", sorted(PRE_TOKENIZERS), "default")]
        merges = read_merges(values, vocabulary)
        model = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre_tokenizer.ignore_merges)
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizer.build()
        to_bytes, add_bos, add_space = byte_level_bytes, pre_tokenizer.add_bos, False
    elif kind == "llama":
        add_space = values.flag("add_space_prefix", default=True)
        backend = tokenizers.Tokenizer(make_score_bpe(values, vocabulary))
        # the space is prepended to every segment of text, so after each special token too
        prepend = [normalizers.Prepend(SPACE_MARK)] if add_space else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE_MARK)])
        to_bytes, add_bos = sentencepiece_bytes, True
    else:
        backend = tokenizers.Tokenizer(make_merged_bpe(values, vocabulary))
        backend.normalizer = normalizers.Replace(" ", SPACE_MARK)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(LINES), behavior="isolated")
        to_bytes, add_bos, add_space = sentencepiece_bytes, True, False

    bos_id, eos_id, eos_ids = read_ends(values, vocabulary)
    rstripped = rstripped_texts(Values(source, metadata), vocabulary)
    add_added_tokens(backend, vocabulary, {*eos_ids, *([] if bos_id is None else [bos_id])}, rstripped)
    add_bos, add_eos = values.flag("add_bos_token", default=add_bos), values.flag("add_eos_token")
    return TokenizerSpec(
        backend=backend,
        to_bytes=to_bytes,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=eos_ids,
        prefix_ids=(check_id(values, "bos_token_id", bos_id, vocabulary),) if add_bos else (),
        suffix_ids=(check_id(values, "eos_token_id", eos_id, vocabulary),) if add_eos else (),
        strips_leading_space=add_space,
        fim_ids=read_fim_ids(metadata, vocabulary, source),
        doubled=vocabulary.doubled,
    )


def read_special_texts(metadata: Mapping[str, Any], source: Path = IN_MEMORY) -> dict[str, str]:
    """Texts of the special tokens that chat templates use: bos_token, eos_token and unk_token, if they exist."""
    values = Values(source, metadata, PREFIX)
    tokens = values.texts("tokens")
    found = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown")):
        token_id = special_id(values, key, len(tokens))
        if token_id is not None:
            found[name] = tokens[token_id]
    return found


def read_vocabulary(metadata: Mapping[str, Any], source: Path = IN_MEMORY, *, may_repeat: bool = False) -> Vocabulary:
    """The vocabulary. `may_repeat`: several tokens may have the same text; Gemma 4 has three such pairs. So may tokens
    with damaged characters, which differ in the file."""
    values = Values(source, metadata, PREFIX)
    texts = values.texts("tokens")
    if not texts:
        values.refuse("tokens", "a list of texts, one for each token")
    # an empty text cannot be looked up; these are llama.cpp's names for them
    tokens = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(texts)]
    types = read_types(values, len(tokens))
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    vocabulary = Vocabulary(tokens, types, ids)
    double = next((token for token in vocabulary.doubled.values() if DAMAGED not in token and not may_repeat), None)
    if double is not None:
        raise ModelError(f"{source}: {PREFIX}tokens contains {shown(double)} more than once: tokens must be unique")
    return vocabulary


def read_types(values: Values, num_tokens: int) -> list[int]:
    """A type for each token. A number that is not a TokenType means a normal token, as in llama.cpp."""
    types = values.get("token_type")
    if types is None or types == []:
        return [int(TokenType.NORMAL)] * num_tokens
    if not isinstance(types, list) or not set(map(type, types)) <= {int}:
        values.refuse("token_type", "a list of whole numbers, one for each token")
    check_length(values, "token_type", len(types), num_tokens)
    return types


def check_length(values: Values, key: str, length: int, expected: int) -> None:
    if length != expected:
        raise ModelError(
            f"{values.source}: {values.name(key)} has {length} entries, but {PREFIX}tokens has {expected}: they must "
            "match"
        )


# --- Models ----------------------------------------------------------------------------------------------


def read_merges(values: Values, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The pairs of tokens that are merged, the most frequent first. Raises ModelError."""
    if values.get("merges") is None:
        values.refuse("merges", "a list of texts, each of two tokens with a space between them")
    merges, ids = [], vocabulary.ids
    for rank, line in enumerate(values.texts("merges")):
        space = line.find(" ", 1)  # from the second character: the first may be a space
        left, right = line[:space], line[space + 1 :]
        if space < 0 or not right or left not in ids or right not in ids or left + right not in ids:
            raise ModelError(
                f"{values.source}: {PREFIX}merges[{rank}] is {shown(line)}, which is not two tokens that form a third"
            )
        merges.append((left, right))
    return merges


def make_merged_bpe(values: Values, vocabulary: Vocabulary) -> models.BPE:
    """SentencePiece's pieces, whose merges are listed. A character without a piece becomes its bytes."""
    return models.BPE(
        vocab=vocabulary.ids,
        merges=read_merges(values, vocabulary),
        unk_token=unknown_text(values, vocabulary),
        fuse_unk=True,
        byte_fallback=True,
    )


def make_score_bpe(values: Values, vocabulary: Vocabulary) -> models.BPE:
    """SentencePiece's BPE: of all adjacent pairs whose joint text is a piece, merge the best-scoring piece first."""
    scores = read_scores(values, len(vocabulary.tokens))
    # control, unknown and byte tokens cannot be produced from text, as in SentencePiece
    pieces = vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    longest = max(pieces, key=lambda token_id: len(vocabulary.tokens[token_id]), default=0)
    if (length := len(vocabulary.tokens[longest])) > MAX_PIECE:
        raise ModelError(
            f"{values.source}: {PREFIX}tokens[{longest}] has {length} characters: a token with a score must have at "
            f"most {MAX_PIECE}"
        )
    merges = rank_merges({vocabulary.tokens[token_id]: scores[token_id] for token_id in pieces})
    if len(merges) > MAX_MERGES:
        raise ModelError(
            f"{values.source}: the pieces of {PREFIX}tokens form one another in more than {MAX_MERGES} ways, the limit "
            "for a vocabulary with scores"
        )
    return models.BPE(
        vocab=vocabulary.ids,
        merges=merges,
        unk_token=unknown_text(values, vocabulary),
        fuse_unk=True,
        byte_fallback=True,
    )


def read_scores(values: Values, num_tokens: int) -> list[float]:
    scores = values.get("scores")
    if not isinstance(scores, list) or not set(map(type, scores)) <= {int, float}:
        values.refuse("scores", "a list of numbers, one for each token")
    check_length(values, "scores", len(scores), num_tokens)
    odd = next((token_id for token_id, score in enumerate(scores) if not math.isfinite(score)), None)
    if odd is not None:
        raise ModelError(f"{values.source}: {PREFIX}scores[{odd}] is {scores[odd]}: it must be a finite number")
    return scores


def unknown_text(values: Values, vocabulary: Vocabulary) -> str | None:
    """The text of the unknown token, if there is one."""
    unk_id = special_id(values, "unknown", len(vocabulary.tokens))
    return None if unk_id is None else vocabulary.tokens[unk_id]


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
        if len(pairs) > MAX_MERGES:
            break  # the caller refuses them
    return pairs


# --- Special tokens --------------------------------------------------------------------------------------


def special_id(values: Values, name: str, num_tokens: int) -> int | None:
    """The value of tokenizer.ggml.<name>_token_id. Defaults of `llama` files: <unk> 0, <s> 1, </s> 2. An id that the
    vocabulary does not have is ignored, with a warning, and takes the default's place."""
    key = f"{name}_token_id"
    if values.get(key) is None:
        defaults = {"unknown": 0, "bos": 1, "eos": 2} if values.get("model") == "llama" else {}
        usual = defaults.get(name, num_tokens)
        return usual if usual < num_tokens else None
    token_id = token_id_below(values, key, num_tokens)
    if token_id is None:
        logger.warning(
            "%s: %s is %s, but the vocabulary has %d tokens: it is ignored",
            values.source, values.name(key), values.get(key), num_tokens,
        )  # fmt: skip
    return token_id


def read_ends(values: Values, vocabulary: Vocabulary) -> tuple[int | None, int | None, frozenset[int]]:
    """(bos_id, eos_id, eos_ids)."""
    num_tokens = len(vocabulary.tokens)
    stated = {name: special_id(values, name, num_tokens) for name in ("bos", "eos", "eot", "eom")}
    valid = {name: token_id for name, token_id in stated.items() if token_id is not None}
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


def read_fim_ids(metadata: Mapping[str, Any], vocabulary: Vocabulary, source: Path = IN_MEMORY) -> dict[str, int]:
    """The ids for filling in the middle that the file names, under llama.cpp's keys or its older ones."""
    keys = {
        "prefix": ("fim_pre", "prefix"),
        "suffix": ("fim_suf", "suffix"),
        "middle": ("fim_mid", "middle"),
        "pad": ("fim_pad",),
        "rep": ("fim_rep",),
        "sep": ("fim_sep",),
    }
    values, found = Values(source, metadata, PREFIX), {}
    for name, spellings in keys.items():
        ids = (special_id(values, key, len(vocabulary.tokens)) for key in spellings)
        token_id = next((one for one in ids if one is not None), None)
        if token_id is not None:
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


def rstripped_texts(values: Values, vocabulary: Vocabulary) -> frozenset[str]:
    """Texts of the added tokens that take the whitespace after them: Phi-3's. GGUF does not say so; as llama.cpp, by
    the model's name."""
    name = values.text("general.name", "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    added = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    texts = {vocabulary.tokens[token_id] for token_id in added} | {"</s>"}
    return frozenset(texts - {"<unk>", "<s>", "<|endoftext|>"})


def check_id(values: Values, key: str, token_id: int | None, vocabulary: Vocabulary) -> int:
    if token_id is None:
        values.refuse(key, f"below {len(vocabulary.tokens)}, because the tokenizer adds this token to each text")
    return token_id
