"""What kernels are called in tables: by what they do in the model, not by how they are compiled.

Our own kernels carry their role in their names (`gate_up_Q4_0_1x3072x576`); tinygrad's carry shapes (`r_2_16_36`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

ANSI = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z]?)?")
_SHAPE = re.compile(r"_\d+(?:x\d+)*(?:_wide\d+)?$")  # behind it: how much threadgroup memory a launch takes
_FORMAT = re.compile(r"_(?:float\d+|bfloat16|half|(?:I?Q\d\w*?))$")
_GENERATED = re.compile(r"^[rE](?:n\d+)?(?:_\d+)*(?:n\d+)?$")
_WORDS = {
    "lm_head": "head",
    "decode_attention": "attention",
    "prefill_attention": "attention",
    "write_kv": "kv write",
    "store_kv": "kv write",
    "sum": "residual sum",
    "join": "join logits",
}
# Kernels behind the head that make a token of logits, whatever further ones a sampler may get.
SAMPLE = "sample"
_SAMPLING = ("logprobs_", "leaders_", "draw_", "process_", "bias_", "typical_", "count_")


def strip_colors(text: str) -> str:
    """Without terminal escapes, also one that was cut in the middle."""
    return ANSI.sub("", text)


def is_generated(program: str) -> bool:
    """tinygrad's own name, which says shapes and no role."""
    return _GENERATED.match(program) is not None


def role_of(program: str) -> str | None:
    """The role in a kernel's name, in words; None where the name is tinygrad's own."""
    name = strip_colors(program).strip()
    if not name or is_generated(name):
        return None
    role = _FORMAT.sub("", _SHAPE.sub("", name))
    role = re.sub(r"^sum\d+_norm$", "sum_norm", re.sub(r"^sum\d+$", "sum", role))
    return _WORDS.get(role, role.replace("_", " "))


def is_sampling(program: str) -> bool:
    """Whether the kernel works on logits, by its name."""
    return strip_colors(program).startswith(_SAMPLING)


def label(layer: int | None, operation: str) -> str:
    """`layer 3 · qkv`, or the operation alone where it belongs to no layer."""
    return operation if layer is None else f"layer {layer} · {operation}"


def layers_by_order(operations: Iterable[str]) -> Iterator[int | None]:
    """The layer of each kernel of a trace, counted from the embedding: a text says no more. None outside of layers."""
    layer: int | None = None
    inside = False  # a step, between the embedding and the head
    for operation in operations:
        if operation == "embed":
            layer, inside = None, True
        elif operation in ("head", SAMPLE):
            inside = False
        elif inside and operation == "qkv":
            layer = 0 if layer is None else layer + 1
        yield layer if inside else None
