"""Routing and the experts' products against NumPy. On a GPU: DEV=CL python -m pytest -m gpu tests/ops

All formats by several numbers of rows: python -m pytest -m "sweep and not gpu" tests/ops/test_experts.py
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tests.ops.builders import FORMATS, largest_difference
from tests.ops.experts import Case, Result, expected_layer, expected_routing, make_kind, run_layer, run_routing
from tests.sweeps import swept
from tinyvllm.config import LayerKind
from tinyvllm.device.handle import DeviceHandle, open_device, upload
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.cpu.sharded import Sharded
from tinyvllm.ops.gpu.backend import GpuBackend
from tinyvllm.ops.reference import ReferenceBackend

GPT_OSS = make_kind(4, 4, activation="clamped_swiglu", has_router_bias=True, has_biases=True)
ROUTERS = {
    "mixtral": Case(make_kind(8, 2)),
    "qwen3": Case(make_kind(64, 8), num_tokens=40),
    "olmoe": Case(make_kind(16, 4, renormalizes=False), num_tokens=2),
    "gpt-oss": Case(GPT_OSS, num_tokens=1),
    "deepseek-v3": Case(
        make_kind(32, 8, score="sigmoid", has_choice_bias=True, num_groups=8, top_groups=3, scale=2.5), num_tokens=40
    ),
    "gemma4": Case(make_kind(16, 1, has_expert_scale=True)),
    "qwen3.5": Case(make_kind(32, 3, has_shared_gate=True)),
    "qwen3.5, stacked": Case(make_kind(8, 3, has_shared_gate=True), num_tokens=40, stacks_shared=True),
    "glm4": Case(make_kind(8, 2, score="sigmoid", has_choice_bias=True, scale=1.8), stacks_shared=True),
}
LAYERS = {
    "one row": Case(make_kind(8, 2), "float16", 1, epilogue="rs"),
    "one row with a norm after it": Case(make_kind(8, 1), num_tokens=1, epilogue="rsn"),
    "one row with biases": Case(GPT_OSS, "MXFP4-e8m0", 1),
    "biases": Case(GPT_OSS, "MXFP4-e8m0", 7, epilogue="rn"),
    "more experts than pairs": Case(make_kind(64, 3, activation="gelu_tanh"), "Q8_0", 2, epilogue="r"),
    "a shared expert": Case(make_kind(4, 2, has_shared_gate=True), "Q4_0", 7, stacks_shared=True, epilogue="s"),
    "one row with a shared expert": Case(make_kind(4, 2), "affine4_g64-float16", 1, stacks_shared=True),
    "tiles": Case(make_kind(8, 8, 256), "Q4_K", 40, epilogue="r"),
}


def check_routing(found: Result, expected: Result) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=2e-5)
    assert (found.shared is None) == (expected.shared is None)
    if found.shared is not None and expected.shared is not None:
        np.testing.assert_allclose(found.shared, expected.shared, rtol=2e-5)


def check(backend: Backend, case: Case) -> None:
    found, expected = run_layer(backend, case), expected_layer(case)
    check_routing(found, expected)
    assert found.out is not None and expected.out is not None
    assert largest_difference(found.out, expected.out) < 2e-5


@pytest.mark.parametrize("name", swept(ROUTERS, ["deepseek-v3"]))  # layers below have the other kinds
def test_routers_choose_what_numpy_chooses(backend: Backend, name: str) -> None:
    """Two experts always have the same score: the first is chosen first."""
    check_routing(run_routing(backend, ROUTERS[name]), expected_routing(ROUTERS[name]))


# of what other layers have, too
LIKES = (
    "one row",
    "one row with a norm after it",
    "one row with biases",
    "more experts than pairs",
    "one row with a shared expert",
)


@pytest.mark.parametrize("name", swept(LAYERS, [name for name in LAYERS if name not in LIKES]))
def test_a_layer_equals_numpy(backend: Backend, name: str) -> None:
    check(backend, LAYERS[name])


NAMED = ("deepseek-v3", "qwen3.5", "qwen3.5, stacked")


@pytest.mark.parametrize("name", NAMED)
def test_the_reference_chooses_what_numpy_chooses(device: DeviceHandle, name: str) -> None:
    check_routing(run_routing(ReferenceBackend(device), ROUTERS[name]), expected_routing(ROUTERS[name]))


@pytest.mark.parametrize("name", swept(NAMED, []))  # rendered by default: tests/ops/test_rendering.py
def test_the_general_form_chooses_what_numpy_chooses(device: DeviceHandle, name: str) -> None:
    check_routing(run_routing(GpuBackend(device, "float32"), ROUTERS[name]), expected_routing(ROUTERS[name]))


def test_the_reference_equals_numpy(reference: ReferenceBackend) -> None:
    check(reference, replace(LAYERS["biases"], fmt="float32", num_tokens=3))


@pytest.mark.parametrize(
    "name", swept(("tiles", "one row with a norm after it", "a shared expert"), ["a shared expert"])
)
def test_several_cores_give_what_one_gives(device: DeviceHandle, name: str) -> None:
    """Shards are uneven: 3 panels of hidden columns among 2 cores."""
    if not device.is_cpu:
        pytest.skip("of a CPU's cores")
    backend = CpuBackend(open_device(2), None, [LayerKind(2, 2, 32)])
    case = replace(LAYERS[name], hidden=96, fmt="Q8_0")
    x = Sharded(tuple(upload(case.x[:, a:b], core) for a, b, core in ((0, 32, "CPU"), (32, 96, "CPU:1"))), (32, 64))
    found, expected = run_layer(backend, case, x).out, expected_layer(case).out
    assert found is not None and expected is not None
    assert largest_difference(found, expected) < 2e-5


@pytest.mark.parametrize("num_tokens", swept((1, 2, 7), [7]))
def test_experts_that_nobody_chose_are_not_read(backend: Backend, num_tokens: int) -> None:
    """Their weights are NaN."""
    case = Case(make_kind(32, 2), "float16", num_tokens)
    chosen = frozenset(expected_routing(case).ids.reshape(-1).tolist())
    dead = replace(case, dead=frozenset(range(32)) - chosen)
    assert len(dead.dead) >= 32 - 2 * num_tokens
    expected, found = run_layer(backend, case).out, run_layer(backend, dead).out
    assert expected is not None and found is not None
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", swept(("qwen3", "deepseek-v3", "qwen3.5, stacked"), ["deepseek-v3"]))
def test_ids_are_those_of_experts_whatever_the_rows_hold(backend: Backend, name: str) -> None:
    """As rows that pad a step may hold anything."""
    case = ROUTERS[name]
    x = case.x
    x[0], x[1, 3], x[2] = np.nan, np.inf, -3e38
    found = run_routing(backend, case, x)
    assert found.ids.min() >= 0 and found.ids.max() < case.num_stacked
    expected = expected_routing(case)
    np.testing.assert_array_equal(found.ids[3:], expected.ids[3:])


def test_a_row_depends_on_no_other_row(backend: Backend) -> None:
    case = Case(make_kind(4, 2), "Q8_0", 7)
    together = run_layer(backend, case).out
    assert together is not None
    few = run_layer(backend, replace(case, num_tokens=2)).out
    assert few is not None
    np.testing.assert_allclose(few, together[:2], rtol=1e-6, atol=1e-6)


SWEEP = [*product((*FORMATS, "MXFP4-e8m0", "affine4_g64-float16", "IQ2_S-float16"), (1, 7, 40))]


@pytest.mark.sweep
@pytest.mark.parametrize(("fmt", "num_tokens"), SWEEP)
def test_any_format_equals_numpy(backend: Backend, fmt: str, num_tokens: int) -> None:
    check(backend, Case(make_kind(6, 2, 256), fmt, num_tokens, epilogue="r"))
