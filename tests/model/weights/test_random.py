"""Random weights: of the asked kind and shape, repeatable, and of a spread that a deep model survives."""

from __future__ import annotations

import numpy as np
import pytest

from tinyvllm.arrays import LazyCodes, QuantizedMatrix, format_of, to_float32
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.model.weights.random import DRAWN_ROWS, RANDOM_KINDS, AlikeWeights, RandomWeights

SHAPE = (200, 512)


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_matrix_has_the_asked_kind_and_spread(kind: str) -> None:
    matrix = RandomWeights(kind, seed=0).take("w", SHAPE)
    stored = matrix.format.name if isinstance(matrix, QuantizedMatrix) else str(matrix.dtype)
    assert stored == kind
    values = to_float32(matrix)
    assert values.shape == SHAPE and np.isfinite(values).all()
    assert 0.7 < values.std() * np.sqrt(SHAPE[1]) < 1.4
    assert abs(values.mean()) < 0.2 * values.std()


@pytest.mark.parametrize("kind", ["float16", "Q4_1", "Q6_K"])
def test_values_follow_from_seed_and_name(kind: str) -> None:
    def values(seed: int, name: str) -> np.ndarray:
        return to_float32(RandomWeights(kind, seed).take(name, SHAPE))

    assert (values(0, "a") == values(0, "a")).all()
    assert (values(0, "a") != values(0, "b")).any() and (values(0, "a") != values(1, "a")).any()


def test_drawn_rows_are_repeated() -> None:
    values = to_float32(RandomWeights("float32", 0).take("w", SHAPE))
    assert (values[DRAWN_ROWS:] == values[:-DRAWN_ROWS]).all() and (values[0] != values[1]).any()


def test_vector_is_near_one() -> None:
    vector = RandomWeights("Q4_0", 0).take("norm", (512,))
    assert isinstance(vector, np.ndarray) and vector.dtype == np.float32 and abs(vector.mean() - 1) < 0.1


def test_k_kinds_fall_back_where_rows_are_not_whole_blocks() -> None:
    matrix = RandomWeights("Q4_K", 0).take("w", (64, 576))
    assert isinstance(matrix, QuantizedMatrix) and matrix.format.name == "Q5_0"


def test_rows_without_whole_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="blocks of 32"):
        RandomWeights("Q4_0", 0).take("w", (64, 40))


def test_unknown_kind_lists_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"float16.*Q4_K"):
        RandomWeights("int3", 0)


def test_a_router_s_rows_all_differ() -> None:
    values = to_float32(RandomWeights("float16", 0).take("model.layers.0.mlp.gate.weight", SHAPE))
    assert len(np.unique(values, axis=0)) == len(values)


def test_experts_may_be_of_another_kind() -> None:
    weights = RandomWeights("bfloat16+mxfp4", 0)
    experts = weights.take("model.layers.0.mlp.experts.gate_proj.weight", SHAPE)
    assert isinstance(experts, QuantizedMatrix) and experts.format.name == "mxfp4"
    assert isinstance(experts.codes, LazyCodes), "rows are repeated when they are packed"
    rest = weights.take("model.layers.0.mlp.shared_expert.gate_proj.weight", SHAPE)
    assert isinstance(rest, np.ndarray) and str(rest.dtype) == "bfloat16"
    with pytest.raises(UnsupportedModelError, match="the second is that of experts"):
        RandomWeights("bfloat16+mxfp4+Q4_0", 0)


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_weights_for_tracing_have_the_same_shape_and_format(kind: str) -> None:
    first, second = (make(kind, 0).take("w", SHAPE) for make in (RandomWeights, AlikeWeights))
    assert first.shape == second.shape and format_of(first) == format_of(second)
