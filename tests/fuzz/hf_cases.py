"""Mutations of tiny model directories of every family, quantized format and kind of tokenizer. A seed names a case."""

from __future__ import annotations

import base64
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tokenizers

from tests.builders import CHATML, TinyLlama, make_weights, write_tiny_hf_llama
from tests.families.pooled_models import write_classifier, write_embedder
from tests.families.recipe import write_hf
from tests.families.recipes import RECIPES
from tests.fuzz.hf_image import File, Image, Link, Tree, make_tensors, mutate_file, read_image
from tests.fuzz.mutate import TEXTS, strange_value
from tests.text.vocabularies import spm_metadata
from tinyvllm.text.gguf_tokenizer import rank_merges

CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
SETTINGS, SPECIAL, TOKENIZER = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
TOKEN = {"content": "<|late|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
# What files may say besides what the tiny ones say, with a usual value
MORE_KEYS: dict[str, dict[str, Any]] = {
    CONFIG: {
        "model_type": "llama",
        "text_config": {"model_type": "llama", "num_hidden_layers": 2},
        "quantization_config": {"quant_method": "awq", "bits": 4, "config_groups": {"g": {"weights": {"num_bits": 4}}}},
        "quantization": {"group_size": 32, "bits": 4, "model.embed_tokens": {"bits": 8, "group_size": 32}},
        "rope_scaling": YARN,
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        "partial_rotary_factor": 0.5,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64,
        "sliding_window_pattern": 2,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
        "no_rope_layers": [1, 0],
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "full_attn_idxs": [0],
        "per_layer_config": {"0": {"head_dim": 16}},
        "id2label": {"0": "LABEL_0"},
        "num_labels": 1,
        "is_causal": True,
        "use_bidirectional_attention": False,
        "residual_multiplier": 0.2,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "pad_token_id": -1,
        "bos_token_id": [257],
    },
    GENERATION: {
        "eos_token_id": [258, 256],
        "bos_token_id": 257,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "typical_p": 1.0,
        "repetition_penalty": 1.1,
    },
    SETTINGS: {
        "added_tokens_decoder": {"260": TOKEN},
        "chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": CHATML}],
        "bos_token": {"content": "<|im_start|>", "lstrip": False},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": True,
        "model_max_length": int(1e30),
    },
    SPECIAL: {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "unk_token": "a"},
    INDEX: {"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors"}},
    "modules.json": {},
    "1_Pooling/config.json": {"pooling_mode": "mean", "pooling_mode_cls_token": True},
    "quantize_config.json": {"bits": 4, "group_size": 32, "desc_act": False},
    "chat_template.json": {"chat_template": CHATML},
}
# Parts of tokenizer.json, with numbers and texts from TEXTS and others put in
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PATTERNS: tuple[str, ...] = (
    r"\p{N}{1,3}",
    r"\s+(?!\S)|\s+",
    "(a+)+b",
    "",
    "[",
    "(?:a{1000}){1000}",
    r"(\w)\1",
    "(" * 50 + ")" * 50,
)
PATTERNS += ("a" * 9000, r"(?:\w+ ?)+$", "\\", "(?<=a*)b", "[[a-z]&&[^b]]+", r"\p{Nonsense}", "(?i:a|b)?" * 30)


def _part(rng: Random, name: str, depth: int = 0) -> Any:
    """One part of a tokenizer, of any kind, mostly with values that fit."""
    count = rng.choice((0, 1, 1, 2, 3, 40))
    if depth < 3 and rng.random() < 0.3:
        key = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}.get(name, f"{name[5:]}s")
        key = {"post_processor": "processors", "decoder": "decoders"}.get(name, key)
        part = _part(rng, name, depth + 1)
        same = rng.random() < 0.5
        return {"type": "Sequence", key: [part if same else _part(rng, name, depth + 1) for _ in range(count)]}
    pattern = rng.choice(({"Regex": rng.choice(PATTERNS)}, {"String": rng.choice((" ", "a", "", "\u2581", "ab"))}))
    content = rng.choice(("", " ", "\u2581", "a" * 300, "a" * 100_000, "é"))
    blob = rng.choice((b"", b"\0\0\0\0", b"\xff\xff\xff\x7f" + bytes(50), b"\x10\0\0\0" + bytes(20) + b"a" * 5000))
    blob = blob if rng.random() < 0.7 else (400).to_bytes(4, "little") + rng.randbytes(400) + b"a\0bc\0\xff\0"
    flags = {"add_prefix_space": rng.random() < 0.5, "trim_offsets": True, "use_regex": rng.random() < 0.5}
    ids = [rng.choice((0, 1, 259, 10**6, 2**31))] * rng.choice((1, 1, 2, 100, 5000))
    piece = rng.choice(({"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}))
    kinds: dict[str, list[dict[str, Any]]] = {
        "normalizer": [
            {"type": "Replace", "pattern": pattern, "content": content},
            {"type": "Prepend", "prepend": content},
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()},
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
            {"type": rng.choice(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel"))},
        ],
        "pre_tokenizer": [
            BYTE_LEVEL | flags,
            {
                "type": "Split",
                "pattern": pattern,
                "behavior": rng.choice(("Isolated", "Removed", "x")),
                "invert": False,
            },
            {"type": "FixedLength", "length": rng.choice((0, 1, 5, 2**63, -1))},
            {"type": "Metaspace", "replacement": rng.choice(("\u2581", "ab", "")), "prepend_scheme": "always"},
            {"type": "CharDelimiterSplit", "delimiter": rng.choice((" ", "", "ab"))},
            {"type": "Digits", "individual_digits": True},
            {"type": "Punctuation", "behavior": "Isolated"},
            {"type": rng.choice(("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "Spaceship"))},
        ],
        "post_processor": [
            {
                "type": "TemplateProcessing",
                "single": [piece] * rng.choice((1, 2, 50, 3000)),
                "pair": [],
                "special_tokens": {"x": {"id": "x", "ids": ids, "tokens": ["x"] * rng.choice((len(ids), 1))}},
            },
            {"type": rng.choice(("BertProcessing", "RobertaProcessing")), "sep": ["a", ids[0]], "cls": ["b", 1]}
            | flags,
            BYTE_LEVEL | flags,
        ],
        "decoder": [
            BYTE_LEVEL,
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": rng.choice(("always", "never", "first"))},
            {"type": "Replace", "pattern": pattern, "content": content},
            {"type": "Strip", "content": " ", "start": rng.choice((0, 1, 2**63)), "stop": 0},
            {"type": rng.choice(("Fuse", "ByteFallback", "WordPiece", "CTC", "BPEDecoder"))},
        ],
    }
    return rng.choice(kinds[name])


def _model(rng: Random, model: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's model with another kind, other settings, or a vocabulary with strange entries."""
    vocab = model.get("vocab", {})
    words = list(vocab) if isinstance(vocab, dict) else [word for word, _ in vocab]
    long = rng.choice(("a" * 3000, "a" * 5000, "a" * 200_000))
    return rng.choice(
        (
            model | {"type": "Unigram", "unk_id": rng.choice((0, 5, 10**9)), "vocab": [[w, -1.0] for w in words]},
            model
            | {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": [[w, -1.0] for w in (*words, long)]},
            model | {"type": "Unigram", "vocab": rng.choice(([], [["", 0.0]], [["a", -1e308]] * 3))},
            model | {"type": "WordLevel", "unk_token": rng.choice(("a", "zzz", ""))},
            model
            | {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##"}
            | {"max_input_chars_per_word": rng.choice((0, 100, 10**9))},
            {key: value for key, value in model.items() if key != "type"},
            model | {rng.choice(("continuing_subword_prefix", "end_of_word_suffix")): rng.choice(("a", "abc", long))},
            model | {"dropout": rng.choice((0.0, 0.5, 1.0, 2.0))},
            model | {"vocab": {word: rng.choice((0, 7, 2**24, 2**32 - 1)) for word in words}},
            model | {"vocab": dict(vocab) | {long: 260} if isinstance(vocab, dict) else vocab},
            model | {"unk_token": rng.choice(("a", "zzz", "")), "fuse_unk": True, "byte_fallback": rng.random() < 0.5},
            model | {"merges": rng.choice(([["a", "b"]], ["a b"], ["ab"], [["a"]], [["a", "b", "c"]], [["", "a"]]))},
        )
    )


def _mutate_tokenizer(rng: Random, tree: dict[str, Any]) -> Any:
    changed = dict(tree)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens"))
        if name == "model":
            changed["model"] = _model(rng, tree["model"])
        elif name == "added_tokens":
            content = rng.choice(("a", " ", "\n", "", "ab", "a" * 3000, "a" * 5000, "\u2581", "é"))
            flags = {key: rng.random() < 0.5 for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            token = {"id": rng.choice((0, 260, 10**6, 2**32 - 1)), "content": content} | flags
            changed["added_tokens"] = [*tree["added_tokens"], token]
        else:
            changed[name] = _part(rng, name)
    return changed


# --- Valid directories -----------------------------------------------------------------------------------------------


@functools.cache
def base_images() -> tuple[Image, ...]:
    """Valid directories that differ in family, format of the weights and tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        writers: list[Callable[[Path], object]] = [
            write_tiny_hf_llama,
            functools.partial(write_tiny_hf_llama, shards=2, dtype="bfloat16"),
            functools.partial(write_tiny_hf_llama, family="qwen3", tie=False),
            write_embedder,
            write_classifier,
            *(functools.partial(write_hf, recipe=recipe) for recipe in RECIPES.values()),
        ]
        images = []
        for number, write in enumerate(writers):
            write(Path(folder) / str(number))
            images.append(read_image(Path(folder) / str(number)))
    llama = images[0]
    images += [_quantized(llama, *one) for one in _formats()]
    images += [llama | {TOKENIZER: Tree(tokenizer)} for tokenizer in _tokenizers(llama)]
    return tuple(images)


def _tokenizers(llama: Image) -> Iterator[dict[str, Any]]:
    """Of SentencePiece's kinds, as transformers saves them."""
    metadata = spm_metadata()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = rank_merges(dict(zip(tokens[259:], scores[259:], strict=True)))
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.decoder = tokenizers.decoders.Metaspace()
    bpe = json.loads(backend.to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    yield bpe | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}}
    unigram = {"type": "Unigram", "unk_id": 0, "byte_fallback": True}
    unigram |= {"vocab": [list(pair) for pair in zip(tokens, map(float, scores), strict=True)]}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    yield bpe | {"model": unigram, "pre_tokenizer": metaspace}


def _formats() -> Iterator[tuple[dict[str, Any], Callable[[np.ndarray], dict[str, tuple[str, np.ndarray]]]]]:
    """(quantization_config, the tensors of a matrix by the ends of their names) of each method."""
    ones = np.ones

    def words(rows: int, columns: int) -> np.ndarray:
        return np.full((rows, columns), 0x12345678, np.int32)

    def mlx(w: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
        n, k = w.shape
        scale = ("F16", ones((n, k // 32), np.float16))
        return {".weight": ("U32", words(n, k // 8)), ".scales": scale, ".biases": scale}

    def awq(w: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
        n, k = w.shape
        scale = ("F16", ones((k // 32, n), np.float16))
        return {".qweight": ("I32", words(k, n // 8)), ".qzeros": ("I32", words(k // 32, n // 8)), ".scales": scale}

    def gptq(w: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
        n, k = w.shape
        order = ("I32", np.arange(k, dtype=np.int32) // 32)
        scale = ("F16", ones((k // 32, n), np.float16))
        zeros = ("I32", words(k // 32, n // 8))
        return {".qweight": ("I32", words(k // 8, n)), ".qzeros": zeros, ".scales": scale, ".g_idx": order}

    def fp8(w: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
        n, k = w.shape
        scale = ones((-(-n // 128), -(-k // 128)), np.float32)
        return {".weight": ("F8_E4M3", ones((n, k), np.uint8)), ".weight_scale_inv": ("F32", scale)}

    def packed(w: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
        n, k = w.shape
        scale, shape = ("BF16", ones((n, k // 32), np.uint16)), ("I64", np.array([n, k]))
        zeros = ("I32", words(n // 8, k // 32))
        return {".weight_packed": ("I32", words(n, k // 8)), ".weight_scale": scale, ".weight_shape": shape} | {
            ".weight_zero_point": zeros
        }

    def nvfp4(w: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
        n, k = w.shape
        scale = ("F8_E4M3", ones((n, k // 16), np.uint8))
        whole = ("F32", ones(1, np.float32))
        return {".weight": ("U8", ones((n, k // 2), np.uint8)), ".weight_scale": scale, ".weight_scale_2": whole}

    def nf4(w: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
        n, k = w.shape
        state = {"shape": [n, k], "blocksize": 64, "quant_type": "nf4", "dtype": "bfloat16", "nested_blocksize": 256}
        text = np.frombuffer(json.dumps(state | {"nested_offset": 0.1}).encode(), np.uint8)
        return {
            ".weight": ("U8", ones((n * k // 2, 1), np.uint8)),
            ".weight.absmax": ("U8", ones(n * k // 64, np.uint8)),
            ".weight.quant_map": ("F32", np.linspace(-1, 1, 16, dtype=np.float32)),
            ".weight.nested_absmax": ("F32", ones(-(-n * k // 64 // 256), np.float32)),
            ".weight.nested_quant_map": ("F32", np.linspace(-1, 1, 256, dtype=np.float32)),
            ".weight.quant_state.bitsandbytes__nf4": ("U8", text),
        }

    ints = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
    group = {"weights": ints, "input_activations": None, "targets": ["Linear"]}
    yield {"group_size": 32, "bits": 4}, mlx
    yield {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 32}, awq
    yield {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", "desc_act": False}, gptq
    yield {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, fp8
    yield {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}, packed
    yield {"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4
    yield {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4


def _quantized(
    llama: Image, settings: dict[str, Any], parts: Callable[[np.ndarray], dict[str, tuple[str, np.ndarray]]]
) -> Image:
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    for name, weight in make_weights(TinyLlama()).items():
        if weight.ndim == 2 and "_proj" in name:
            module = name.removesuffix(".weight")
            arrays |= {module + end: array for end, array in parts(weight).items()}
        else:
            arrays[name] = ("F32", weight)
    config = llama[CONFIG]
    assert isinstance(config, Tree)
    changed = config.value | {"quantization_config": settings}
    return llama | {CONFIG: Tree(changed), "model.safetensors": make_tensors(arrays)}


# --- Cases -----------------------------------------------------------------------------------------------------------

WEIGHTS = {CONFIG: 8, TOKENIZER: 8, SETTINGS: 3, GENERATION: 2, SPECIAL: 1, INDEX: 4, "modules.json": 4}
LINKS = (Link(is_pipe=True), Link(), Link("/dev/zero"), Link("/dev/null"), Link("absent"), Link("../outside"))


def make_case(seed: int) -> Image:
    """A directory with one or a few mutations, mostly of one file."""
    rng = Random(seed)
    image = dict(rng.choice(base_images()))
    for _ in range(rng.choice((1, 1, 1, 2))):
        _mutate(rng, image)
    return image


def _mutate(rng: Random, image: Image) -> None:
    if rng.random() < 0.06:
        name = rng.choice([*image, "chat_template.jinja", GENERATION, SPECIAL])
        image[name] = rng.choice(LINKS)
        return
    if rng.random() < 0.4:  # another key, or a file, that the tiny ones lack
        name = rng.choice(sorted(MORE_KEYS))
        file = image.get(name, Tree({}))
        if isinstance(file, Tree) and isinstance(file.value, dict) and MORE_KEYS[name]:
            key = rng.choice(sorted(MORE_KEYS[name]))
            value = MORE_KEYS[name][key] if rng.random() < 0.6 else strange_value(rng)
            image[name] = Tree(file.value | {key: value})
            if rng.random() < 0.7:
                image[name] = Tree(file.value | {key: _mutated(rng, value)})
            return
    names = sorted(image)
    name = rng.choices(names, [WEIGHTS.get(name, 4) for name in names])[0]
    file = image[name]
    if isinstance(file, Link):
        return
    if name == TOKENIZER and isinstance(file, Tree) and isinstance(file.value, dict) and rng.random() < 0.6:
        image[name] = Tree(_mutate_tokenizer(rng, file.value))
    elif name == INDEX and isinstance(file, Tree) and rng.random() < 0.5:
        image[name] = Tree(_renamed(rng, file.value))
    else:
        image[name] = mutate_file(rng, file)


def _mutated(rng: Random, value: Any) -> Any:
    tree = mutate_file(rng, Tree(value))
    return tree.value if isinstance(tree, Tree) else value


def _renamed(rng: Random, index: Any) -> Any:
    """An index in which a tensor is in another file."""
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
        return index
    name = rng.choice(sorted(index["weight_map"]))
    other = rng.choice((*TEXTS, "a" * 300, "config.json", ".", "parts/../model.safetensors", "model.safetensors"))
    return index | {"weight_map": index["weight_map"] | {name: other}}


def describe(image: Image, base: Mapping[str, File]) -> str:
    """Which files differ, for people who look at a case."""
    return ", ".join(name for name in image if image[name] != base.get(name))
