"""Mutations of tiny GGUF files of every family and kind of tokenizer. A seed names a case."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.builders import WIDE, GGUFTweaks, write_tiny_gguf
from tests.families.recipe import write_gguf
from tests.families.recipes import RECIPES
from tests.fuzz.gguf_image import ARRAY, BOOL, FLOATS, FORMS, KINDS, STRING, Image, TensorInfo, Value, parse
from tests.fuzz.mutate import FLOATS as EXTREME_FLOATS
from tests.fuzz.mutate import INTEGERS, TEXTS, mutate_bytes, mutate_list
from tests.text.vocabularies import spm_metadata

LENGTHS = (0, 1, 2, 31, 32, 33, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
# What files may say besides what the tiny ones say, with a usual value
MORE_KEYS: dict[str, Any] = {
    "general.alignment": 64,
    "general.file_type": 7,
    "general.type": "model",
    "general.name": "Phi-3 mini",
    "general.sampling.temp": 0.7,
    "general.sampling.top_k": 40,
    "general.sampling.top_p": 0.9,
    "general.sampling.min_p": 0.05,
    "general.sampling.penalty_repeat": 1.1,
    "split.count": 1,
    "split.no": 0,
    "split.tensors.count": 3,
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.bos_token_id": 257,
    "tokenizer.ggml.eos_token_id": 258,
    "tokenizer.ggml.eot_token_id": 258,
    "tokenizer.ggml.eom_token_id": 258,
    "tokenizer.ggml.unknown_token_id": 256,
    "tokenizer.ggml.padding_token_id": 256,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": True,
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.ggml.fim_pre_token_id": 1,
    "tokenizer.ggml.fim_suf_token_id": 2,
    "tokenizer.ggml.fim_mid_token_id": 3,
    "tokenizer.ggml.suffix_token_id": 2,
    "tokenizer.ggml.scores": [0.0, -1.0],
    "tokenizer.ggml.token_type": [1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.chat_template": "{{ messages[0].content }}",
    "tokenizer.chat_template.tool_use": "{{ tools }}",
    "tokenizer.chat_templates": ["tool_use"],
}
ARCH_KEYS: dict[str, Any] = {
    "pooling_type": 3,
    "vocab_size": 260,
    "rope.dimension_count": 16,
    "rope.freq_base": 1e4,
    "rope.freq_base_swa": 1e4,
    "rope.scale_linear": 2.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "attention.sliding_window": 128,
    "attention.sliding_window_pattern": 4,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.key_length_swa": 16,
    "attention.shared_kv_layers": 1,
    "attention.scale": 0.1,
    "attention.temperature_scale": 0.1,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "nextn_predict_layers": 1,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_group_count": 2,
    "embedding_length_per_layer_input": 16,
    "full_attention_interval": 4,
}


@functools.cache
def base_images() -> tuple[Image, ...]:
    """Valid files that differ in family, tokenizer and types of tensors."""
    spm = {key: value for key, value in spm_metadata().items() if value is not None}
    num_pieces = len(spm["tokenizer.ggml.tokens"])
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rows = np.ones((2, 64), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"

        def image(**options: Any) -> Image:
            write_tiny_gguf(path, **options)
            return parse(path.read_bytes())

        images = [
            image(),
            image(quant="Q8_0", family="qwen3"),
            image(quant="Q4_K", tweaks=GGUFTweaks(quant_of={"ffn_down": "Q6_K"}), layers=1, **WIDE),
            image(tweaks=GGUFTweaks(metadata=spm), vocab=num_pieces),
            image(tweaks=GGUFTweaks(metadata=spm | _gemma4_tokenizer(spm)), vocab=num_pieces),
            image(rope_scaling=llama3 | {"original_max_position_embeddings": 64}, tie=False),
            image(
                family="qwen3",
                tweaks=GGUFTweaks(metadata={"qwen3.pooling_type": 4}, extra={"cls.output.weight": rows}),
            ),
        ]
        for recipe in RECIPES.values():
            if recipe.gguf_arch is not None:
                write_gguf(path, recipe)
                images.append(parse(path.read_bytes()))
        write_gguf(path, RECIPES["mixtral"])
        images.append(_with_single_experts(parse(path.read_bytes())))
    return tuple(images)


def _with_single_experts(image: Image) -> Image:
    """With a tensor for each expert's matrix, as files had until 2024."""
    tensors = []
    for one in image.tensors:
        columns, rows, count = one.lengths if len(one.lengths) == 3 else (0, 0, 1)
        for expert in range(count):
            name = one.name.replace(b"_exps", b".%d" % expert) if columns else one.name
            offset = one.offset + expert * rows * columns * 4
            tensors.append(replace(one, name=name, lengths=one.lengths[:2], offset=offset))
    return replace(image, tensors=tensors)


def _gemma4_tokenizer(spm: dict[str, Any]) -> dict[str, Any]:
    tokens = spm["tokenizer.ggml.tokens"]
    pairs = [f"{token[0]} {token[1]}" for token in tokens if len(token) == 2 and {token[0], token[1]} <= set(tokens)]
    return {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": pairs}


def make_case(seed: int) -> list[bytes]:
    """The parts of a mutated model, mostly one."""
    rng = Random(seed)
    image = rng.choice(base_images())
    if rng.random() < 0.95:
        return [_mutated(rng, image)]
    middle = rng.randrange(len(image.tensors) + 1)
    parts = [image.with_value(b"split.count", Value(2, 2)), Image([(b"split.count", Value(2, 2))], [], image.data)]
    parts = [
        replace(part.with_value(b"split.no", Value(2, number)), tensors=tensors)
        for number, part, tensors in zip((0, 1), parts, (image.tensors[:middle], image.tensors[middle:]), strict=True)
    ]
    changed = rng.randrange(2)
    return [_mutated(rng, part) if number == changed else part.to_bytes() for number, part in enumerate(parts)]


def _mutated(rng: Random, image: Image) -> bytes:
    """A mutated file: mostly one part of it, sometimes two or three, and now and then bytes of its header."""
    if rng.random() < 0.1:
        return mutate_bytes(rng, image.to_bytes(), within=rng.choice((200, len(image.header()), None)))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        image = rng.choices(MUTATIONS, WEIGHTS)[0](rng, image)
    whole = image.to_bytes()
    return mutate_bytes(rng, whole) if rng.random() < 0.02 else whole


# --- Metadata ----------------------------------------------------------------------------------------------------


def change_value(rng: Random, image: Image) -> Image:
    if not image.values:
        return image
    key, value = rng.choice(image.values)
    return image.with_value(key, mutate_value(rng, value))


def add_value(rng: Random, image: Image) -> Image:
    """A key that the file lacks or has, as a usual value, a mutated one, or any."""
    arch = next((value.item for key, value in image.values if key == b"general.architecture"), b"llama")
    arch = arch if isinstance(arch, bytes) else b"llama"
    if rng.random() < 0.5:
        key, usual = rng.choice(list(MORE_KEYS.items()))
        name = key.encode()
    else:
        key, usual = rng.choice(list(ARCH_KEYS.items()))
        name = arch + b"." + key.encode()
    value = as_value(usual)
    return image.with_value(name, rng.choice((value, mutate_value(rng, value), any_value(rng))))


def change_keys(rng: Random, image: Image) -> Image:
    """Without a key, with one twice, or with one renamed."""
    if not image.values:
        return image
    place = rng.randrange(len(image.values))
    key, value = image.values[place]
    others = image.values[:place] + image.values[place + 1 :]
    name = rng.choice((key[: rng.randrange(len(key) + 1)], key + b"\0", _text(rng), b"", b"k" * 70_000))
    values = rng.choice((others, others, [*image.values, (key, mutate_value(rng, value))], [*others, (name, value)]))
    return replace(image, values=values)


def as_value(usual: Any) -> Value:
    """A Python value as converters write it."""
    if isinstance(usual, bool):
        return Value(BOOL, usual)
    if isinstance(usual, int):
        return Value(4, usual)
    if isinstance(usual, float):
        return Value(6, usual)
    if isinstance(usual, str):
        return Value(STRING, usual.encode())
    first = as_value(usual[0])
    return Value(ARRAY, [as_value(item).item for item in usual], first.kind)


def any_value(rng: Random, depth: int = 0) -> Value:
    kind = rng.choice(KINDS)
    if kind == STRING:
        return Value(kind, _text(rng))
    if kind != ARRAY:
        return Value(kind, _number(rng, kind))
    item_kind = rng.choice(KINDS if depth < 2 else tuple(FORMS))
    count = rng.choice((0, 1, 2, 2, 3, 260, 5000))
    return Value(
        kind, [_item(rng, item_kind, depth) for _ in range(min(count, 3 if item_kind == ARRAY else count))], item_kind
    )


def _item(rng: Random, kind: int, depth: int = 0) -> Any:
    if kind == ARRAY:
        nested = any_value(rng, depth + 1)
        return nested if nested.kind == ARRAY else Value(ARRAY, [], 4)
    return _text(rng) if kind == STRING else _number(rng, kind)


def _number(rng: Random, kind: int) -> Any:
    if kind in FLOATS:
        return rng.choice(EXTREME_FLOATS)
    return rng.choice((*INTEGERS, rng.randrange(300)))


def _text(rng: Random) -> bytes:
    return rng.choice((rng.choice(TEXTS).encode(errors="surrogatepass"), b"\xff\xfe", b"\xc3", rng.randbytes(4)))


def mutate_value(rng: Random, value: Value) -> Value:
    """A value of the same type with other contents, of another type with the same, or any."""
    choice = rng.random()
    if choice < 0.3:
        return any_value(rng)
    if choice < 0.4:
        return replace(value, kind=rng.choice((*FORMS, 13, 99, 2**32 - 1)), item=_as_number(value.item))
    if value.kind == ARRAY:
        return _mutated_array(rng, value)
    if value.kind == STRING:
        return _mutated_string(rng, value)
    if isinstance(value.item, (int, float)) and rng.random() < 0.4:
        return replace(value, item=rng.choice((value.item + 1, value.item - 1, value.item * 2, -value.item)))
    return replace(value, item=_number(rng, value.kind))


def _as_number(item: Any) -> float:
    return item if isinstance(item, (int, float)) else len(item)


def _mutated_string(rng: Random, value: Value) -> Value:
    if rng.random() < 0.1:
        return replace(value, stated=rng.choice(LENGTHS))
    text = bytes(value.item)
    return replace(value, item=rng.choice((mutate_bytes(rng, text), text + text, _text(rng), text * 100)))


def _mutated_array(rng: Random, value: Value) -> Value:
    choice = rng.random()
    if choice < 0.1:
        return replace(value, stated=rng.choice(LENGTHS))
    if choice < 0.2:
        kind = rng.choice(KINDS)
        return replace(value, item_kind=kind, item=[_item(rng, kind) for _ in value.item[:300]])
    if choice < 0.3:
        return replace(value, item=[_item(rng, value.item_kind)] * len(value.item))
    if choice < 0.6 and value.item:
        items = list(value.item)
        for _ in range(rng.choice((1, 1, 3, 30))):
            items[rng.randrange(len(items))] = rng.choice((_item(rng, value.item_kind), rng.choice(items)))
        return replace(value, item=items)
    return replace(value, item=mutate_list(rng, list(value.item), _item(rng, value.item_kind)))


# --- Tensors and the file's own numbers --------------------------------------------------------------------------


def change_tensor(rng: Random, image: Image) -> Image:
    if not image.tensors:
        return image
    place = rng.randrange(len(image.tensors))
    tensors = list(image.tensors)
    tensors[place] = _mutated_info(rng, tensors[place], image)
    return replace(image, tensors=tensors)


def _mutated_info(rng: Random, info: TensorInfo, image: Image) -> TensorInfo:
    other = rng.choice(image.tensors)
    size = len(image.data)
    changes: list[Callable[[], dict[str, Any]]] = [
        lambda: {"name": rng.choice((other.name, _text(rng), b"", b"t" * 70_000, info.name + b"\0"))},
        lambda: {"lengths": _mutated_lengths(rng, info.lengths)},
        lambda: {"lengths": other.lengths},
        lambda: {"kind": rng.choice((*range(45), 2**31, 2**32 - 1))},
        lambda: {"kind": other.kind},
        lambda: {"offset": rng.choice((other.offset, info.offset + 1, info.offset - 32, size, size - 1, 0, 2**63))},
        lambda: {"offset": rng.choice((2**64 - 1, 2**64 - 32, info.offset + 32))},
        lambda: {"num_dims": rng.choice((0, 1, 5, 2**16, 2**31, 2**32 - 1))},
    ]
    return replace(info, **rng.choice(changes)())


def _mutated_lengths(rng: Random, lengths: tuple[int, ...]) -> tuple[int, ...]:
    changed = list(lengths)
    if not changed or rng.random() < 0.3:
        return rng.choice(((), (1,) * 4, (2,) * 9, (2**32, 2**32), (0, 2**63), tuple(reversed(lengths)), (1, *lengths)))
    changed[rng.randrange(len(changed))] = rng.choice((*LENGTHS, lengths[0] * 2, lengths[0] - 1))
    return tuple(changed)


def change_tensors(rng: Random, image: Image) -> Image:
    """Without a tensor, with one twice, in another order, or with two names exchanged."""
    if len(image.tensors) < 2:
        return image
    place, other = rng.sample(range(len(image.tensors)), 2)
    tensors = list(image.tensors)
    one, two = tensors[place], tensors[other]
    tensors[place], tensors[other] = replace(one, name=two.name), replace(two, name=one.name)
    dropped = image.tensors[:place] + image.tensors[place + 1 :]
    return replace(image, tensors=rng.choice((dropped, dropped, [*image.tensors, one], tensors, [])))


def change_numbers(rng: Random, image: Image) -> Image:
    """The header's own numbers, or where the data begins and ends."""
    count = rng.choice((*LENGTHS, len(image.values) - 1, len(image.values) + 1))
    changes: list[dict[str, Any]] = [
        {"num_values": count},
        {"num_tensors": count},
        {"version": rng.choice((0, 1, 2, 4, 2**31, 3 << 24))},
        {"magic": rng.choice((b"FUGG", b"\0\0\0\0", b"GGUf", b"vers"))},
        {"alignment": rng.choice((1, 8, 64, 4096))},
        {"data": image.data[: rng.randrange(len(image.data) + 1)]},
        {"data": b""},
    ]
    return replace(image, **rng.choice(changes))


def change_data(rng: Random, image: Image) -> Image:
    """Numbers of a tensor that are not finite, negative or zero."""
    if not image.tensors or not image.data:
        return image
    offset = rng.choice(image.tensors).offset % len(image.data)
    special = rng.choice((np.nan, np.inf, -np.inf, 0.0, -1.0, 1e38))
    data = np.array([special] * 16, np.float32).tobytes()
    return replace(image, data=(image.data[:offset] + data + image.data[offset + len(data) :])[: len(image.data)])


MUTATIONS = (change_value, add_value, change_keys, change_tensor, change_tensors, change_numbers, change_data)
WEIGHTS = (9, 5, 2, 4, 1, 1, 1)
