"""A model's files computed in NumPy by the plain reference of every operation. Nothing is compiled, so that what a
family's layers and its files mean is checked in a tenth of an engine's time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import tinyvllm.ops  # noqa: F401  (makes tinygrad's settings before anything here imports tinygrad)
from tests.ops.builders import Piece, make_step
from tinyvllm.config import ModelFiles
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.model.registry import complete_config, make_model
from tinyvllm.model.weights.checkpoint import open_checkpoint, with_own_head
from tinyvllm.ops.backend import Step
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout
from tinyvllm.storage.model_config import read_model_config

NUM_POSITIONS, BLOCK_SIZE = 192, 8


def next_logprobs(files: ModelFiles, token_ids: Sequence[int], count: int, kv: str = "float32") -> np.ndarray:
    """(count, V): of the token after each of the last `count` of `token_ids`. These come in three steps: two thirds of
    them, the others but the last, and the last in a step that decodes; in two where there are few.
    `kv`: the format of keys and values."""
    config = read_model_config(files)
    checkpoint = open_checkpoint(files, config)
    config = complete_config(with_own_head(config, checkpoint))
    device = DeviceHandle("CPU", has_threads=False, is_unified=True, cores=("CPU",))
    ops = ReferenceBackend(device)
    model = make_model(config, checkpoint, ops, NUM_POSITIONS, lambda done, total: None)
    states, blocks = model.config.states, NUM_POSITIONS // BLOCK_SIZE
    pool = ops.make_pool(model.pool_groups, count * blocks + 1, BLOCK_SIZE, kv, states, 2 if states else 0)
    last = len(token_ids) - 1
    first = max(0, min(last - count, last * 2 // 3))
    assert count - 1 <= last < NUM_POSITIONS, f"{len(token_ids)} tokens for {count} rows"
    rows = np.empty((0, config.vocab_size))
    for piece in (Piece(0, first), Piece(first, last - first), Piece(last)) if first else (Piece(0, last), Piece(last)):
        # `count` rows of logits, of one sequence: the others have no tokens. Those before its tokens are dropped below
        num_tokens = count if piece.start == last else piece.count
        layout = StepLayout(num_tokens, count, blocks, BLOCK_SIZE, len(model.pool_groups), has_states=bool(states))
        buffer = make_step(layout, [piece])
        views, end = layout.views(buffer), piece.start + piece.count
        views["token_ids"][: piece.count] = token_ids[piece.start : end]
        views["logit_rows"][:] = np.maximum(np.arange(piece.count - count, piece.count), 0)
        if states:
            views["state_reads"][0], views["state_writes"][0], views["first_rows"][1:] = 1, 1, piece.count
        step = Step(layout, device.upload(buffer), pool, is_decode=piece.start == last)
        logits = model(step).numpy().reshape(count, model.logit_stride)[:, : config.vocab_size].astype(np.float64)
        rows = np.concatenate([rows[1:], logits[:1]]) if piece.start == last else logits
    top = rows.max(axis=1, keepdims=True)
    logprobs: np.ndarray = rows - top - np.log(np.exp(rows - top).sum(axis=1, keepdims=True))
    return logprobs
