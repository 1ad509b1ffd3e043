"""Operations on groups of columns, one for each layer, against the plain reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.ops.builders import largest_difference, make_epilogue, make_host, normal, run_product
from tinyvllm.config import LayerKind
from tinyvllm.device.handle import open_device
from tinyvllm.ops.backend import Backend, Epilogue, Norm, Step
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.reference import ReferenceBackend
from tinyvllm.ops.step_inputs import StepLayout

GROUP, GROUPS, HIDDEN = 64, 5, 64


def gate(ops: Backend, tokens: int) -> np.ndarray:
    """The columns of group 3, normed and added to others, times an activation of another product."""
    upload = ops.device.upload
    matrices = [ops.matrix(make_host("Q8_0", rows, HIDDEN, seed=rows)) for rows in (GROUP * GROUPS, GROUP)]
    x = upload(normal(tokens, HIDDEN, seed=1))
    wide, narrow = (run_product(ops, x, matrix, tokens) for matrix in matrices)
    norm = Norm(upload(1 + 0.3 * normal(GROUP, seed=2)), 0.05)
    factors = ops.norm_groups(wide, norm, tokens, wide)
    start = upload(np.array([3 * GROUP], np.int32))
    out = ops.gate_columns(narrow, factors, start, tokens, "gelu_tanh")
    return np.concatenate([part.numpy().reshape(tokens, -1) for part in ops.parts_of(out)], axis=1)


@pytest.mark.parametrize("tokens", [1, 20])
def test_gated_columns_equal_the_reference(backend: Backend, reference: ReferenceBackend, tokens: int) -> None:
    assert largest_difference(gate(backend, tokens), gate(reference, tokens)) < 1e-5


def test_groups_may_span_cores(reference: ReferenceBackend) -> None:
    two = CpuBackend(open_device(2), None, [LayerKind(4, 2, 32)])
    assert len(two.cores) == 2
    assert largest_difference(gate(two, 3), gate(reference, 3)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_scale_after_the_residual_equals_the_reference(
    backend: Backend, reference: ReferenceBackend, tokens: int
) -> None:
    def run(ops: Backend) -> np.ndarray:
        x, residual = (ops.device.upload(normal(tokens, cols, seed=cols)) for cols in (HIDDEN, 96))
        epilogue = make_epilogue(ops, residual, 96, "n")
        epilogue = replace(epilogue, out_scale=ops.device.upload(np.array([0.37], np.float32)))
        matrix = ops.matrix(make_host("Q8_0", 96, HIDDEN, seed=5))
        return run_product(ops, x, matrix, tokens, epilogue=epilogue).numpy()

    assert largest_difference(run(backend), run(reference)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_sum_s_own_norm_and_residual_equal_the_reference(
    backend: Backend, reference: ReferenceBackend, tokens: int
) -> None:
    assert largest_difference(finished(backend, tokens), finished(reference, tokens)) < 1e-5


def test_a_sum_on_two_cores_is_normed_as_a_whole(reference: ReferenceBackend) -> None:
    two = CpuBackend(open_device(2), None, [LayerKind(4, 2, 32)])
    assert largest_difference(finished(two, 3), finished(reference, 3)) < 1e-5


def finished(ops: Backend, tokens: int) -> np.ndarray:
    """A product and what `finish` makes of it: normed, added to another product, and scaled."""
    upload = ops.device.upload
    matrices = [ops.matrix(make_host("Q8_0", 96, HIDDEN, seed=seed)) for seed in (5, 6)]
    x = upload(normal(tokens, HIDDEN, seed=1))
    total, residual = (run_product(ops, x, matrix, tokens) for matrix in matrices)
    epilogue = Epilogue(
        post_norm=Norm(upload(1 + 0.3 * normal(96, seed=2)), 0.05),
        scale=0.7,
        residual=residual,
        out_scale=upload(np.array([0.37], np.float32)),
    )
    out = ops.finish(total, tokens, epilogue)
    return np.concatenate([part.numpy().reshape(tokens, -1) for part in ops.parts_of(out)], axis=1)


@pytest.mark.parametrize("tokens", [1, 20])
def test_normed_rows_are_stored_and_taken_like_the_references(
    backend: Backend, reference: ReferenceBackend, tokens: int
) -> None:
    """Side by side with other columns, in memory that outlives steps; then some of the rows by number."""
    first, stride = 2 * HIDDEN, 3 * HIDDEN
    layout = StepLayout(num_tokens=4, num_seqs=4, max_blocks=1, block_size=8)
    numbers = np.zeros(layout.size, np.int32)
    layout.views(numbers)["logit_rows"][:] = [tokens - 1, 0, tokens // 2, 99]  # the last one is beyond the end

    def run(ops: Backend) -> np.ndarray:
        norm = Norm(ops.device.upload(1 + 0.3 * normal(HIDDEN, seed=2)), 0.05)
        matrix = ops.matrix(make_host("Q8_0", HIDDEN, HIDDEN, seed=7))
        x = run_product(ops, ops.device.upload(normal(tokens, HIDDEN, seed=1)), matrix, tokens)
        rows = ops.store_normed(x, norm, tokens, ops.make_rows(tokens * stride), first, stride)
        pool = ops.make_pool((), [], 8, "float32")
        step = Step(layout, ops.device.upload(np.minimum(numbers, tokens - 1)), pool, is_decode=True)
        taken = ops.take_rows(rows, step, stride, tokens)
        return np.concatenate([ops.parts_of(one)[0].numpy().reshape(-1) for one in (rows, taken)])

    assert largest_difference(run(backend), run(reference)) < 1e-5
