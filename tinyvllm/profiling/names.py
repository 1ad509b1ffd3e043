"""Names of kernels in tables: what they do in the model, not how they are compiled.

Our own kernels have their role in their names (`gate_up_Q4_0_1x3072x576`); tinygrad's have shapes (`r_2_16_36`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

ANSI = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z]?)?")
_SHAPE = re.compile(r"_\d+(?:x\d+)*$")
_FORMAT = re.compile(r"_(?:float\d+|bfloat16|half|(?:I?Q\d\w*?))$")
_GENERATED = re.compile(r"^[rE](?:n\d+)?(?:_\d+)*(?:n\d+)?$")
_WORDS = {
    "lm_head": "head",
    "decode_attention": "attention",
    "prefill_attention": "attention",
    "stream_attention": "attention",
    "write_kv": "kv write",
    "store_kv": "kv write",
    "rotate": "kv write",
    "latent_attention": "attention",
    "write_latents": "kv write",
    "store_latents": "kv write",
    "sum": "residual sum",
    "join": "join logits",
}
FIRST_OF_LAYER = ("qkv", "recurrent in", "conv in")  # the products that a layer begins with
# Kernels after the head, which turn logits into a token.
SAMPLE = "sample"
_SAMPLING = ("logprobs_", "leaders_", "draw_", "process_", "bias_", "typical_", "count_")


def strip_colors(text: str) -> str:
    """The text without terminal escapes, even one that was cut off."""
    return ANSI.sub("", text)


def is_generated(program: str) -> bool:
    """Whether tinygrad made up the name, which then has shapes but no role."""
    return _GENERATED.match(program) is not None


def role_of(program: str) -> str | None:
    """The role in a kernel's name, in words; None if tinygrad made the name up."""
    name = strip_colors(program).strip()
    if not name or is_generated(name):
        return None
    role = _FORMAT.sub("", _SHAPE.sub("", name))
    role = re.sub(r"^sum\d+_norm$", "sum_norm", re.sub(r"^sum\d+$", "sum", role))
    return _WORDS.get(role, role.replace("_", " "))


def is_sampling(program: str) -> bool:
    """Whether the kernel samples, judging by its name."""
    return strip_colors(program).startswith(_SAMPLING)


def label(layer: int | None, operation: str) -> str:
    """`layer 3 · qkv`, or only the operation if it belongs to no layer."""
    return operation if layer is None else f"layer {layer} · {operation}"


_TRACE_NAME = re.compile(r"^(?:layer (?P<layer>\d{1,6}) )?(?P<operation>[^:]+): (?P<program>\S.*)$")


def trace_label(layer: int | None, operation: str) -> str:
    """The same in ASCII, before the program's name in a line of DEBUG=2: `layer 3 qkv: qkv_Q4_0_1x960x576`."""
    return operation if layer is None else f"layer {layer} {operation}"


def split_trace_name(name: str) -> tuple[int | None, str | None, str]:
    """(layer, operation, program) of the name in a line of DEBUG=2; no operation if it has no label."""
    found = _TRACE_NAME.match(name)
    if found is None:
        return None, None, name
    return None if found["layer"] is None else int(found["layer"]), found["operation"], found["program"]


def layers_by_order(operations: Iterable[str]) -> Iterator[int | None]:
    """The layer of each kernel of a log, counted from the embedding, since the log does not say; None outside
    layers."""
    layer: int | None = None
    inside = False  # between the embedding and the head of a step
    before = ""
    for operation in operations:
        if operation == "embed":
            layer, inside = None, True
        elif operation in ("head", SAMPLE):
            inside = False
        elif inside and operation in FIRST_OF_LAYER and operation != before:  # several kernels: parts, a gate
            layer = 0 if layer is None else layer + 1
        before = operation
        yield layer if inside else None
