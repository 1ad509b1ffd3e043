"""Routing and the experts' products against the plain reference. On a GPU: DEV=CL python -m pytest -m gpu tests/ops"""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.builders import largest_difference
from tests.ops.experts import Case, make_kind, run_layer
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.reference import ReferenceBackend

CASES = {
    "softmax": Case(make_kind()),
    "one": Case(make_kind(), num_tokens=1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_equals_the_reference(backend: Backend, reference: ReferenceBackend, name: str) -> None:
    case = CASES[name]
    for epilogue in ("", "rs", "rsn"):
        ours, plain = run_layer(backend, case, epilogue), run_layer(reference, case, epilogue)
        np.testing.assert_array_equal(ours.ids, plain.ids)
        np.testing.assert_allclose(ours.weights, plain.weights, rtol=1e-5)
        assert largest_difference(ours.out, plain.out) < 1e-5
