"""The rules that choose the shapes of products' kernels, against times measured on an H200 (data/h200.json, written by
scripts/sweep_products.py), and the model that they follow."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.ops.kernel.products import Bench, Product, products_of, values_text
from tests.ops.rendering import rendered
from tinyvllm.bench.shapes import find_shape
from tinyvllm.execution.tune import PREDICTION_ERROR

TABLE = Path(__file__).parent / "data" / "h200.json"
NEAR, SHARE = 1.05, 0.9  # of products, whose kernels by the rules take at most so much longer than the fastest measured
SHAPES = ("qwen2.5-0.5b", "llama-3.2-1b", "gemma-3-4b", "llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b")


@cache
def hopper() -> Any:
    """The backend of an H200 that is not here."""
    backend = rendered("CUDA", is_chained=True)
    backend.has_wgmma = True
    return backend


def rule_of(product: Product) -> Any:
    return Bench(hopper(), product, is_dry=True).spec()


def losses(*, is_dense: bool) -> dict[str, float | None]:
    """By product in float16, or in 4 bits: the time by the rules over the fastest one, less 1; None if it was not
    measured."""
    found: dict[str, float | None] = {}
    for name, entry in json.loads(TABLE.read_text(encoding="utf-8"))["products"].items():
        product, times = Product.parse(name), entry["us"]
        if (product.kind == "float16") != is_dense:
            continue
        spec = rule_of(product)
        is_known = [knob for knob, _ in spec.values] == entry["knobs"] and values_text(spec) in times
        found[name] = times[values_text(spec)] / min(times.values()) - 1 if is_known else None
    return found


@pytest.mark.parametrize("is_dense", [True, False], ids=["float16", "4 bits"])
def test_rules_are_near_the_fastest_measured_kernel(is_dense: bool) -> None:
    """For 90 % of the products within 5 %. A kernel whose knobs changed has to be measured again."""
    found = losses(is_dense=is_dense)
    misses = {name: loss for name, loss in found.items() if loss is None or loss > NEAR - 1}
    lines = [f"{name}: {'not measured' if loss is None else f'{loss:.0%} slower'}" for name, loss in misses.items()]
    assert len(misses) <= (1 - SHARE) * len(found), "\n".join([f"{len(misses)} of {len(found)} products:", *lines])


def test_predictions_are_near_measured_times() -> None:
    """Of one row's products in float16: the root mean square error of shapes up to 30 % slower than the fastest."""
    errors = []
    for name, entry in json.loads(TABLE.read_text(encoding="utf-8"))["products"].items():
        product = Product.parse(name)
        if product.num_tokens > 1 or product.kind != "float16":
            continue
        spec, fastest = rule_of(product), min(entry["us"].values())
        for values, us in entry["us"].items():
            if us < 1.3 * fastest:
                chosen = tuple(zip(entry["knobs"], map(int, values.split()), strict=True))
                errors.append(math.log(replace(spec, chosen=chosen).predicted_s * 1e6 / us))
    error = math.sqrt(sum(value * value for value in errors) / len(errors))
    assert error < PREDICTION_ERROR, f"{error:.1%} over {len(errors)} kernels"


@pytest.mark.parametrize("shape", SHAPES)
def test_one_row_is_predicted_to_take_no_longer_than_eight(shape: str) -> None:
    """All products of a model's layer that have a prediction for both, which those of 24 MB and more do."""
    one, eight = (
        [rule_of(product).predicted_s for product in products_of(find_shape(shape), "float16", tokens)]
        for tokens in (1, 8)
    )
    known = [(first, second) for first, second in zip(one, eight, strict=True) if first and second]
    assert known and sum(first for first, _ in known) <= sum(second for _, second in known), (one, eight)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_row_was_measured_to_take_no_longer_than_eight(shape: str) -> None:
    """The products of a layer and the head, in the shapes of the rules that were measured."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))["products"]
    names = [[str(product) for product in products_of(find_shape(shape), "float16", tokens)] for tokens in (1, 8)]
    pairs = [pair for pair in zip(*names, strict=True) if all(name in table for name in pair)]
    one, eight = ([table[name]["us"][table[name]["rule"]] for name in column] for column in zip(*pairs, strict=True))
    assert sum(one) <= sum(eight), pairs
