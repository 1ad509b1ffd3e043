"""Hugging Face tensors' names as different writers have them, made those of the language model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinyvllm.arrays import take_rows, to_float32
from tinyvllm.model.weights.stored import StoredTensor

logger = logging.getLogger(__name__)

# What wrappers of training add before a module's own names: torch.compile, data parallelism
DRAFTING_TENSOR = re.compile(r"(?:model\.|language_model\.)?mtp\.(?:layers\.(\d+)\.)?(.+)")
WRAPPERS = ("_orig_mod.", "module.")
COMPARED_ROWS = 1024
MODEL, EMBEDDING_NAME, HEAD_NAME = "model.", "model.embed_tokens.weight", "lm_head.weight"


def unwrapped(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Without the names of wrappers: torch.compile's anywhere, another's if every name begins with it."""
    named = {name.replace(WRAPPERS[0], ""): tensor for name, tensor in tensors.items()}
    if named and all(name.startswith(WRAPPERS[1]) for name in named):
        named = {name.removeprefix(WRAPPERS[1]): tensor for name, tensor in named.items()}
    return named


def with_drafting(tensors: Mapping[str, StoredTensor], num_layers: int) -> dict[str, StoredTensor]:
    """The tensors of a layer that drafts by the names of a layer after the last: `mtp.layers.0.` as `model.layers.N.`,
    and what else it has as `model.layers.N.mtp.`."""
    found = {}
    for name, tensor in tensors.items():
        if match := DRAFTING_TENSOR.fullmatch(name):
            layer, rest = match.groups()
            number = num_layers + int(layer or 0)
            name = f"model.layers.{number}.{rest}" if layer else f"model.layers.{number}.mtp.{rest}"
        found[name] = tensor
    return found


def with_model(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The names of a model with a head, if its base model was saved alone, whose names lack `model.`."""
    if EMBEDDING_NAME.removeprefix(MODEL) not in tensors:
        return dict(tensors)
    return {name if name == HEAD_NAME else MODEL + name: tensor for name, tensor in tensors.items()}


def tied(source: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a model that is said to be tied, without a head that equals the embeddings.

    As in transformers 5, a head with other values stays, and one without embeddings beside it takes their place.
    """
    found = dict(tensors)
    head, embedding = found.get(HEAD_NAME), found.get(EMBEDDING_NAME)
    if head is None:
        return found
    if embedding is None:
        found[EMBEDDING_NAME] = found.pop(HEAD_NAME)
    elif _is_equal(head, embedding):
        del found[HEAD_NAME]
    else:
        logger.warning(
            "%s: config.json ties the head to the embeddings, but the files have a head of other values, which is used",
            source,
        )
    return found


def _is_equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two matrices have the same values, read some rows at a time."""
    if (a.shape, a.format_name) != (b.shape, b.format_name):
        return False
    values, others = a.read(), b.read()
    for begin in range(0, a.shape[0], COMPARED_ROWS):
        rows = slice(begin, begin + COMPARED_ROWS)
        if not np.array_equal(to_float32(take_rows(values, rows)), to_float32(take_rows(others, rows))):
            return False
    return True
