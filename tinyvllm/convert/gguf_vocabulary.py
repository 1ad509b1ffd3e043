"""A Hugging Face directory's tokenizer as tokenizer.ggml.* metadata, as llama.cpp's converter writes it.

Two kinds can be written: byte-level BPE (`gpt2`), and SentencePiece's BPE with bytes as a fallback (`llama`). The
result is compared with the source on texts in many scripts: a tokenizer that would split them otherwise is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from tinyvllm.errors import UnsupportedModelError
from tinyvllm.storage.values import read_json
from tinyvllm.text.chat import read_hf_templates
from tinyvllm.text.gguf_tokenizer import TokenType, read_gguf_tokenizer
from tinyvllm.text.hf_tokenizer import read_hf_tokenizer, read_special_texts
from tinyvllm.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from tinyvllm.text.tokenizer import Tokenizer
from tinyvllm.text.tokenizer_spec import BYTE_TOKEN, TokenizerSpec, byte_level_bytes

# Words, digits, spaces, line ends, punctuation, scripts with and without spaces, marks, and emoji
PROBES = (
    "Hello, World! It's 3.14159 of 1000000000 - isn't it? I'LL SEE, we've done; they'd go...",
    "  two  spaces\n\n\nlines\r\n\ttabs \t end   ",
    "def f(x):\n    return x**2 + 0xFF  # ${HOME}/path_to/file.py?q=1&r=2 <b>@user</b> \\\\ \"quoted\" 'single'",
    "Größe naïve façade Ελληνικά русский текст עברית العربية हिन्दी ไทย 中文字符，日本語のテキスト。한국어 텍스트",
    "🙂🚀👩‍👩‍👧‍👦 e\u0301 \u200bzero ½ ① ٣٤٥ ﬁ CamelCaseWords snake_case 12ab34 e.g. U.S.A. $1,234.56",
    "/*\n///\n---\n+++===!!!???\n\n \n x", "a" * 40, " " * 20 + "x", "1" * 23, "  ", "'s 'S 'll",
)  # fmt: skip
BPE_KEYS = ("bos", "eos", "unk", "pad")
GGUF_NAMES = {"unk": "unknown", "pad": "padding"}


def vocabulary_metadata(directory: Path, num_rows: int) -> dict[str, Any]:
    """tokenizer.ggml.* for the tokenizer in `directory`, with as many tokens as the embedding has rows, and its chat
    template. Raises UnsupportedModelError for a kind of tokenizer that GGUF cannot say."""
    spec = read_hf_tokenizer(directory)
    stored = json.loads(spec.backend.to_str())
    if stored["model"].get("type") != "BPE":
        raise UnsupportedModelError(
            f"{directory} has a {stored['model'].get('type')} tokenizer, which cannot be written as GGUF: only BPE can "
            "be. Use llama.cpp's converter, or --to mlx-4"
        )
    tokens, types = _tokens(spec, num_rows)
    metadata: dict[str, Any] = {}
    if spec.to_bytes is byte_level_bytes:
        if not stored["model"]["merges"]:
            raise UnsupportedModelError(
                f"{directory / 'tokenizer.json'} has no merges, which a GGUF file cannot be without: use --to mlx-4 or "
                "fp8"
            )
        metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre_tokenizer(directory, spec, stored)}
        lists: dict[str, Any] = {"merges": [" ".join(_pair(merge)) for merge in stored["model"]["merges"]]}
    else:
        metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        metadata["tokenizer.ggml.add_space_prefix"] = spec.strips_leading_space
        lists = {"scores": _scores(tokens, stored["model"]["merges"])}
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    metadata |= {f"tokenizer.ggml.{name}": values for name, values in lists.items() if values}
    metadata |= _special_ids(directory, spec)
    _check(directory, spec, metadata)
    return metadata | _templates(directory)


def _templates(directory: Path) -> dict[str, Any]:
    """Chat templates: the default one, and those with names."""
    key = "tokenizer.chat_template"
    templates = read_hf_templates(directory)
    return {key if name == "default" else f"{key}.{name}": text for name, text in templates.items()}


def _pair(merge: Any) -> list[str]:
    """The two halves of a merge, which old files write as one string."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _tokens(spec: TokenizerSpec, num_rows: int) -> tuple[list[str], list[int]]:
    """Texts and types by id. Rows without a token get a name that no text contains, as llama.cpp's converter has it."""
    added = spec.backend.get_added_tokens_decoder()
    text_of = {token_id: text for text, token_id in spec.backend.get_vocab().items()}
    unknown = json.loads(spec.backend.to_str())["model"].get("unk_token")
    is_byte_level = spec.to_bytes is byte_level_bytes
    tokens, types = [], []
    for token_id in range(max(num_rows, 1 + max(text_of))):
        text = text_of.get(token_id)
        if text is None:
            kind = TokenType.UNUSED
        elif token_id in added:
            kind = TokenType.CONTROL if added[token_id].special else TokenType.USER_DEFINED
        elif not is_byte_level and BYTE_TOKEN.fullmatch(text):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        if not is_byte_level and text is not None and text == unknown:
            kind = TokenType.UNKNOWN
        tokens.append(f"[PAD{token_id}]" if text is None else text)
        types.append(int(kind))
    return tokens, types


def _pre_tokenizer(directory: Path, spec: TokenizerSpec, stored: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that splits texts into words: the one that splits PROBES in the same way."""
    splits = [_splits(spec.backend.pre_tokenizer, text) for text in PROBES]
    ignores_merges = bool(stored["model"].get("ignore_merges"))
    same = [name for name, rule in _distinct() if [_splits(rule.build(), text) for text in PROBES] == splits]
    exact = [name for name in same if PRE_TOKENIZERS[name].ignore_merges == ignores_merges]
    if not exact:
        raise UnsupportedModelError(
            f"{directory / 'tokenizer.json'} splits texts into words in a way that has no name in llama.cpp that we "
            f"know; known: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return exact[0]


def _distinct() -> list[tuple[str, PreTokenizer]]:
    """The first name of each rule."""
    found: dict[PreTokenizer, str] = {}
    for name, rule in PRE_TOKENIZERS.items():
        found.setdefault(rule, name)
    return [(name, rule) for rule, name in found.items()]


def _splits(pre_tokenizer: tokenizers.pre_tokenizers.PreTokenizer | None, text: str) -> list[str]:
    return [] if pre_tokenizer is None else [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Scores that give the merges' order: a piece is worth the less, the later the first merge that makes it."""
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault("".join(_pair(merge)), len(rank))
    return [float(-rank.get(token, len(rank))) for token in tokens]


def _special_ids(directory: Path, spec: TokenizerSpec) -> dict[str, Any]:
    """Ids of the special tokens, and whether encoding adds them."""
    texts = read_special_texts(directory)
    found: dict[str, Any] = {}
    for name in BPE_KEYS:
        text = texts.get(f"{name}_token")
        token_id = None if text is None else spec.backend.token_to_id(text)
        if token_id is not None:
            found[f"tokenizer.ggml.{GGUF_NAMES.get(name, name)}_token_id"] = token_id
    found |= _turn_end(directory, spec, found)
    found["tokenizer.ggml.add_bos_token"] = spec.bos_id is not None and spec.bos_id in spec.prefix_ids
    found["tokenizer.ggml.add_eos_token"] = spec.eos_id is not None and spec.eos_id in spec.suffix_ids
    return found


def _turn_end(directory: Path, spec: TokenizerSpec, found: dict[str, Any]) -> dict[str, Any]:
    """The id that ends a turn, if generation_config.json names another besides the tokenizer's own end."""
    path = directory / "generation_config.json"
    stated = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    others = [token_id for token_id in ids if token_id != found.get("tokenizer.ggml.eos_token_id")]
    if "tokenizer.ggml.eos_token_id" not in found and others:
        return {"tokenizer.ggml.eos_token_id": others[0]}
    return {"tokenizer.ggml.eot_token_id": others[0]} if others else {}


def _check(directory: Path, spec: TokenizerSpec, metadata: dict[str, Any]) -> None:
    """Raise UnsupportedModelError if the metadata's tokenizer encodes a probe in another way."""
    source, written = Tokenizer(spec), Tokenizer(read_gguf_tokenizer(metadata, directory))
    for text in PROBES:
        if source.encode(text) != written.encode(text):
            raise UnsupportedModelError(
                f"{directory / 'tokenizer.json'}: as GGUF, {text[:40]!r} would be encoded in another way: use "
                "llama.cpp's converter, or --to mlx-4"
            )
