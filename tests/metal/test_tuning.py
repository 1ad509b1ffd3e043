"""No choice that a search may make changes what a product computes."""

from __future__ import annotations

import numpy as np
import pytest

from tests import sweeps
from tests.metal.test_kernels import backends, multiply
from tests.sweeps import swept

pytestmark = pytest.mark.timeout(600)


PRODUCTS = [
    ("Q4_0", 1, "norm_linear"),
    ("Q6_K", 1, "norm_gated"),
    ("float16", 1, "norm_gated"),
    ("float16", 5, "linear_add"),
    ("Q4_K", 70, "norm_linear"),
]


@pytest.mark.parametrize(("fmt", "tokens", "operation"), swept(PRODUCTS, PRODUCTS[:1]), ids=str)
def test_every_candidate_computes_the_same(fmt: str, tokens: int, operation: str) -> None:
    from tinyvllm.ops.kernel import tuning

    (backend, _), size = backends(fmt), (96, 512)
    with tuning.current.watching() as asked:
        expected = multiply(backend, fmt, tokens, operation, *size)
    (key, spec), *_ = asked.items()
    candidates = list(tuning.candidates(spec))[:: 1 if sweeps.is_sweeping else 4]
    assert len(candidates) > 1
    for candidate in candidates:
        tuning.current.chosen[key] = candidate.chosen
        try:
            found = multiply(backend, fmt, tokens, operation, *size)
        finally:
            del tuning.current.chosen[key]
        np.testing.assert_allclose(found, expected, atol=4e-3 * np.abs(expected).max(), err_msg=str(candidate.chosen))
