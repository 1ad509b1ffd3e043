"""Write tests/text/data/tokenizer_reference.json: llama.cpp's token ids for difficult strings.

It has three parts: the default model's tokenizer; the same vocabulary with other pre-tokenizers, for which small files
are written; and a small SentencePiece-style vocabulary that is trained here and stored with its ids, so that tests can
rebuild it. Imports nothing from tinyvllm.

    pip install gguf xllamacpp
    python scripts/make_tokenizer_reference.py MODEL.gguf
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import tempfile
import urllib.request
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp

OUTPUT = Path(__file__).parent.parent / "tests" / "text" / "data" / "tokenizer_reference.json"
PRE_NAMES = ("default", "gpt-2", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3")
NUM_SPM_MERGES = 220
SPACE_MARK = "▁"

TEXTS = [
    "", "a", " ", "Hello world", "Hello, World!", "  leading", "trailing  ", "\n", "\n\n\n   \n x",
    "x" + " " * 50 + "y", "\t\tif x:\n\t\t\treturn 1\n", "a\r\nb\r\n\r\nc", "1234567890", "12345 67 8", "3.14159e-10",
    "0x1F 1_000_000 1,234.50", "ab12cd345ef6789", "٣٤٥ ²³ Ⅷ ½", "𝟘𝟙𝟚 １２３",
    "don't DON'T I'll we've you're he'd it's 'S 'LL", "$100.00 €50 £3 ¥7", "a/b/c\\d", "...!!!???—–-", "'''\"\"\"```",
    "https://example.com/a?b=c&d=%20#frag", 'def f(x: int) -> str:\n    return f"{x!r}"\n',
    "CamelCaseWordsHTTPServer SCREAMING_SNAKE_case", "日本語のテキスト、中文字符。한국어", "مرحبا بالعالم 123",
    "שלום עולם", "हिन्दी में पाठ", "ภาษาไทย", "👨‍👩‍👧‍👦 👍🏽 🇩🇪", "e\u0301 cafe\u0301 ñ n\u0303",
    "ÀÉÎõü ßſ ĲĳŒœ ΑΒΓ αβγ", "﷽ ꧁ 𝕳𝖊𝖑𝖑𝖔", "\u200b\u2028\u2029\u0085\u00a0\u3000x", "\ufeffBOM a\u00adb \ufffd",
    "\x00\x01\x02\x1f\x7f", "\x1c\x1e y", "▁mark▁", "<0x0A>",
    "<|im_start|>user\nhi<|im_end|>", "<|im_start|> <|im_end|> x<|endoftext|>", "<|im_end <| im_end|>", "<s> </s><s>a",
]  # fmt: skip
SPM_CORPUS = """
The quick brown fox jumps over the lazy dog, and the dog thinks that the fox is quicker than the other foxes.
In 1234 there were 56 ships; in 7890 there were more. The theory of the thing is that the thinner thing thickens.
Hello world, hello there, hello again! Don't, can't, won't: it's what they're there for. aaaa bbbb abab baba
def function(argument): return argument + 1    # four spaces    and more        and eight
"""


class LlamaCpp:
    """A llama.cpp server in this process, called over HTTP on its loopback address."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 64
        params.warmup = False
        self._server = xllamacpp.Server(params)

    def encode(self, text: str, **settings: bool) -> list[int]:
        """Settings: add_special, parse_special."""
        body = json.dumps({"content": text, **settings}).encode()
        url, headers = f"{self._server.listening_address}/tokenize", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:
            ids: list[int] = json.load(response)["tokens"]
        return ids


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """Write a model of one tiny layer of zeros with this tokenizer, since llama.cpp loads no tokenizer without a
    model."""
    num_tokens, size = len(metadata["tokenizer.ggml.tokens"]), 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(size)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(num_tokens)
    for key, value in metadata.items():
        is_id = isinstance(value, int) and not isinstance(value, bool)
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if is_id else gguf.GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((num_tokens, size), np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(size, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((size, size), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def train_pieces(corpus: str, num_merges: int) -> list[str]:
    """Plain BPE over the corpus, with `▁` for spaces: the merged pieces in order, then single characters."""
    words = [list(SPACE_MARK + word) for line in corpus.split("\n") for word in line.split(" ")]
    words += [[SPACE_MARK] * length for length in range(2, 9)]
    characters = sorted({character for word in words for character in word})
    made: list[str] = []
    while len(made) < num_merges:
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not counts:
            break
        (left, right), _ = min(counts.items(), key=lambda item: (-item[1], item[0]))
        if left + right not in made:
            made.append(left + right)
        for word in words:
            for index in range(len(word) - 1, 0, -1):
                if word[index - 1 : index + 1] == [left, right]:
                    word[index - 1 : index + 1] = [left + right]
    return [*made, *characters]


def make_spm_metadata() -> dict[str, Any]:
    """<unk>, <s>, </s>, 256 bytes, then pieces with scores that fall by one each, as in SentencePiece."""
    pieces = train_pieces(SPM_CORPUS, NUM_SPM_MERGES)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
    }


def to_lines(values: list[Any]) -> str:
    return ",\n".join(json.dumps(value, ensure_ascii=True, separators=(",", ":")) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the default model's GGUF file")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()

    fields = gguf.GGUFReader(args.model).fields
    metadata = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.ggml.")}
    model = LlamaCpp(args.model)
    cases = [[text, model.encode(text, parse_special=True), model.encode(text, parse_special=False)] for text in TEXTS]
    pre_cases, spm_metadata = [], make_spm_metadata()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        for name in PRE_NAMES:
            write_vocabulary(path, metadata | {"tokenizer.ggml.pre": name})
            other = LlamaCpp(path)
            pre_cases.append([name, [other.encode(text, parse_special=True) for text in TEXTS]])
        write_vocabulary(path, spm_metadata)
        spm = LlamaCpp(path)
        spm_cases = [
            [
                text,
                spm.encode(text, parse_special=True, add_special=True),
                spm.encode(text, parse_special=False, add_special=True),
            ]
            for text in TEXTS
        ]
    header = {
        "about": "llama.cpp's token ids. Written by scripts/make_tokenizer_reference.py.",
        "model_sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        "implementation": f"llama.cpp in xllamacpp {version('xllamacpp')}",
        "fields": "cases, spm_cases: text, ids, ids with parse_special false; pre_cases: name, ids of each case's text",
    }
    parts: dict[str, list[Any]] = {"cases": cases, "pre_cases": pre_cases, "spm_cases": spm_cases}
    body = "".join(f',\n "{name}": [\n{to_lines(values)}\n]' for name, values in parts.items())
    body += f',\n "spm_metadata": {json.dumps(spm_metadata, separators=(",", ":"))}'
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(header, indent=1)[:-2] + body + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
