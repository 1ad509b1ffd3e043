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
from tests.fuzz.hf_image import File, Image, Link, Tensors, Tree, make_tensors, mutate_file, read_image
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
        "sparsity_config": {"format": "dense"},
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
        if name in ("model", "added_tokens") and name not in tree:
            changed[name] = _part(rng, "normalizer")  # another change has removed it
        elif name == "model":
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
    images += [_quantized(llama, *one) for one in FORMATS]
    images.append(_gpt_oss_in_mxfp4(images[5 + list(RECIPES).index("gpt_oss")]))
    images.append({name: file for name, file in images[1].items() if name != INDEX})
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


Arrays = dict[str, tuple[str, np.ndarray]]  # (safetensors' name of the type, values) by the end of a name


def _words(*shape: int) -> tuple[str, np.ndarray]:
    return "I32", np.full(shape, 0x12345678, np.int32)


def _ones(kind: str, *shape: int) -> tuple[str, np.ndarray]:
    """Numbers of a type, small ones."""
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "I64": np.int64}
    return kind, np.ones(shape, dtypes.get(kind, np.uint8))


def _mlx(n: int, k: int, bits: int = 4) -> Arrays:
    scales = _ones("F16", n, k // 32)
    return {".weight": ("U32", _words(n, k * bits // 32)[1]), ".scales": scales, ".biases": scales}


def _mlx_floats(bits: int, group: int, n: int, k: int) -> Arrays:
    return {".weight": ("U32", _words(n, k * bits // 32)[1]), ".scales": _ones("U8", n, k // group)}


def _awq(n: int, k: int) -> Arrays:
    scales = _ones("F16", k // 32, n)
    return {".qweight": _words(k, n // 8), ".qzeros": _words(k // 32, n // 8), ".scales": scales}


def _gptq(bits: int, n: int, k: int) -> Arrays:
    order = "I32", np.arange(k, dtype=np.int32) // 32
    parts = {".qweight": _words(k * bits // 32, n), ".qzeros": _words(k // 32, n * bits // 32)}
    return parts | {".scales": _ones("F16", k // 32, n), ".g_idx": order}


def _fp8(scale: str, scale_shape: str, n: int, k: int) -> Arrays:
    shapes = {"tensor": (), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128)), "group": (n, k // 32)}
    return {".weight": _ones("F8_E4M3", n, k), scale: _ones("F32", *shapes[scale_shape])}


def _int8(n: int, k: int) -> Arrays:
    zeros = _ones("I8", n, 1)
    return {".weight": _ones("I8", n, k), ".weight_scale": _ones("F16", n, 1), ".weight_zero_point": zeros}


def _packed(n: int, k: int) -> Arrays:
    shape, zeros = ("I64", np.array([n, k])), _words(n // 8, k // 32)
    parts = {".weight_packed": _words(n, k // 8), ".weight_scale": _ones("BF16", n, k // 32)}
    return parts | {".weight_shape": shape, ".weight_zero_point": zeros}


def _fp4(group: int, n: int, k: int) -> Arrays:
    parts = {".weight_packed": _ones("U8", n, k // 2)}
    if group == 32:
        return parts | {".weight_scale": _ones("U8", n, k // 32)}
    return parts | {".weight_scale": _ones("F8_E4M3", n, k // 16), ".weight_global_scale": _ones("F32", 1)}


def _nvfp4(n: int, k: int) -> Arrays:
    scale = _ones("F8_E4M3", n, k // 16)
    return {".weight": _ones("U8", n, k // 2), ".weight_scale": scale, ".weight_scale_2": _ones("F32", 1)}


def _nf4(nested: bool, n: int, k: int) -> Arrays:
    state = {"shape": [n, k], "blocksize": 64, "quant_type": "nf4", "dtype": "bfloat16"}
    state |= {"nested_blocksize": 256, "nested_offset": 0.1} if nested else {}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    parts: Arrays = {
        ".weight": _ones("U8", n * k // 2, 1),
        ".weight.absmax": _ones("U8" if nested else "F32", n * k // 64),
        ".weight.quant_map": ("F32", np.linspace(-1, 1, 16, dtype=np.float32)),
        ".weight.quant_state.bitsandbytes__nf4": ("U8", text),
    }
    if nested:
        parts[".weight.nested_absmax"] = _ones("F32", -(-n * k // 64 // 256))
        parts[".weight.nested_quant_map"] = "F32", np.linspace(-1, 1, 256, dtype=np.float32)
    return parts


INTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
GROUP = {"weights": INTS | {"block_structure": [128, 128]}, "input_activations": None, "targets": ["Linear"]}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"g": GROUP}}
# (quantization_config, the tensors of a matrix of n x k) of each format
FORMATS: tuple[tuple[dict[str, Any], Callable[[int, int], Arrays]], ...] = (
    ({"group_size": 32, "bits": 4}, _mlx),
    ({"group_size": 32, "bits": 8}, functools.partial(_mlx, bits=8)),
    ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, functools.partial(_mlx_floats, 4, 32)),
    ({"group_size": 32, "bits": 8, "mode": "mxfp8"}, functools.partial(_mlx_floats, 8, 32)),
    ({"group_size": 16, "bits": 4, "mode": "nvfp4"}, functools.partial(_mlx_floats, 4, 16)),
    ({"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 32}, _awq),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}, functools.partial(_gptq, 4)),
    ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}, functools.partial(_gptq, 8)),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, functools.partial(_fp8, ".weight_scale_inv", "block")),
    ({"quant_method": "fbgemm_fp8"}, functools.partial(_fp8, ".weight_scale", "channel")),
    (COMPRESSED | {"format": "float-quantized"}, functools.partial(_fp8, ".weight_scale", "tensor")),
    (COMPRESSED | {"format": "float-quantized"}, functools.partial(_fp8, ".weight_scale", "group")),
    (COMPRESSED | {"format": "int-quantized"}, _int8),
    (COMPRESSED | {"format": "pack-quantized"}, _packed),
    (COMPRESSED | {"format": "nvfp4-pack-quantized"}, functools.partial(_fp4, 16)),
    (COMPRESSED | {"format": "mxfp4-pack-quantized"}, functools.partial(_fp4, 32)),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, _nvfp4),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, functools.partial(_nf4, True)),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, functools.partial(_nf4, False)),
)


def _quantized(llama: Image, settings: dict[str, Any], parts: Callable[[int, int], Arrays]) -> Image:
    arrays: Arrays = {}
    for name, weight in make_weights(TinyLlama(layers=1, hidden=128, heads=8, ffn=128)).items():
        if weight.ndim == 2 and "_proj" in name:
            module = name.removesuffix(".weight")
            arrays |= {module + end: array for end, array in parts(*weight.shape).items()}
        else:
            arrays[name] = "F32", weight
    config = llama[CONFIG]
    assert isinstance(config, Tree)
    sizes = {"num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 128}
    changed = config.value | sizes | {"quantization_config": settings}
    return llama | {CONFIG: Tree(changed), "model.safetensors": make_tensors(arrays)}


def _gpt_oss_in_mxfp4(image: Image) -> Image:
    """As its own repository has it: blocks and scales of all experts."""
    file, config = image["model.safetensors"], image[CONFIG]
    assert isinstance(file, Tensors) and isinstance(config, Tree)
    arrays: Arrays = {}
    for name, entry in file.header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            experts, cols, rows = shape  # a row for each input
            arrays[f"{name}_blocks"] = _ones("U8", experts, rows, cols // 32, 16)
            arrays[f"{name}_scales"] = _ones("U8", experts, rows, cols // 32)
        else:
            arrays[name] = "F32", np.frombuffer(file.data[begin:end], np.float32).reshape(shape)
    settings = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}
    return image | {CONFIG: Tree(config.value | settings), "model.safetensors": make_tensors(arrays)}


# --- Cases -----------------------------------------------------------------------------------------------------------

WEIGHTS = {CONFIG: 8, TOKENIZER: 8, SETTINGS: 3, GENERATION: 2, SPECIAL: 1, INDEX: 4, "modules.json": 4}
LINKS = (Link(is_pipe=True), Link(), Link("/dev/zero"), Link("/dev/null"), Link("absent"), Link("../outside"))


def make_case(seed: int) -> Image:
    """A directory with one or a few mutations, mostly of one file."""
    rng = Random(seed)
    image = dict(rng.choice(base_images()))
    is_quantized = isinstance(config := image[CONFIG], Tree) and "quantization_config" in config.value
    for _ in range(rng.choice((1, 1, 1, 2))):
        weights = image.get("model.safetensors")
        if is_quantized and isinstance(weights, Tensors) and rng.random() < 0.7:
            image["model.safetensors"] = mutate_file(rng, weights)
        else:
            _mutate(rng, image)
    return image


def _mutate(rng: Random, image: Image) -> None:
    if rng.random() < 0.02:  # a name by which others know their own formats
        name = rng.choice([name for name in image if name.endswith(".safetensors")] or [CONFIG])
        image[rng.choice(("consolidated.safetensors", "pytorch_model.bin", "model-1.safetensors"))] = image.pop(name)
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
