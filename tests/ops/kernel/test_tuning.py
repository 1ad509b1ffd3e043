"""Tuned choices: they overrule rules, are kept in a file, and change no result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor

from tests.ops.builders import make_host, normal
from tinyvllm.arrays import Format
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.backend import Epilogue
from tinyvllm.ops.cpu.backend import CpuBackend
from tinyvllm.ops.cpu.linear import LinearSpec
from tinyvllm.ops.formats.matrix import pack
from tinyvllm.ops.gpu.vector import VectorSpec
from tinyvllm.ops.kernel import tuning
from tinyvllm.ops.kernel.lanes import Lanes
from tinyvllm.ops.kernel.tuning import Choices, candidates, choices_path, combinations, load_choices, spec_key


def make_spec(num_tokens: int = 8) -> LinearSpec:
    matrix = pack(make_host("Q4_0", 64, 64), "panel", None, "CPU")
    return LinearSpec("down", matrix.format, num_tokens, 64, 64)


def test_a_choice_overrules_a_rule_and_no_other_spec() -> None:
    spec, other = make_spec(8), make_spec(4)
    choices = Choices(chosen={spec_key(spec): (("rows_per_pass", 2),)})
    assert (choices.choose(spec).rows_per_pass, choices.choose(other).rows_per_pass) == (2, 4)
    assert spec_key(choices.choose(spec)) == spec_key(spec), "what was chosen is no part of the name"


def test_candidates_turn_one_knob_each_and_are_possible() -> None:
    spec = make_spec(6)
    rows = [candidate.rows_per_pass for candidate in candidates(spec)]
    assert rows == [3, 2, 1]
    assert len(list(candidates(make_spec(1)))) == 1


@pytest.mark.parametrize("rows_per_pass", [1, 2, 4, 8])
def test_no_choice_changes_a_result(device: DeviceHandle, rows_per_pass: int) -> None:
    backend: Any = CpuBackend(device, None)
    x, residual = normal(8, 256), normal(8, 64)
    matrix = backend.matrix(make_host("Q4_K", 64, 256))
    epilogue = Epilogue(residual=device.upload(residual))

    def down() -> Tensor:
        return backend.linear("down", device.upload(x), [matrix], 8, None, epilogue)[0]

    before = down().numpy()
    with tuning.current.watching() as asked:
        down()
    (key,) = asked
    tuning.current.chosen[key] = (("rows_per_pass", rows_per_pass),)
    try:
        after = down().numpy()
    finally:
        del tuning.current.chosen[key]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_choices_outlive_the_process(tmp_path: Path) -> None:
    path = choices_path(tmp_path, "CUDA", "NVIDIA H200")
    assert path.name.startswith("cuda-nvidia-h200-tinygrad-") and path.suffix == ".json"
    Choices(path, {"a": (("tiles", 2),), "b": ()}, {"bad"}, {"model decode 1"}, {"slow"}).save()
    again = load_choices(path)
    assert again.chosen == {"a": (("tiles", 2),), "b": ()}
    assert (again.bad, again.searched, again.slow) == ({"bad"}, {"model decode 1"}, {"slow"})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_two_searches_at_once_keep_what_both_have_found(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    Choices(path, {"old": (("tiles", 1),)}).save()
    first, second = load_choices(path), load_choices(path)
    first.chosen |= {"a": (("tiles", 2),), "both": (("tiles", 4),), "old": (("tiles", 3),)}
    first.bad.add("bad a")
    first.searched.add("decode 1")
    first.save()
    second.chosen |= {"b": (), "both": ()}  # it has found nothing for them
    second.slow.add("slow b")
    second.searched.add("decode 2")
    second.save()
    first.save()
    found = load_choices(path)
    chosen = {"a": (("tiles", 2),), "b": (), "both": (("tiles", 4),), "old": (("tiles", 3),)}
    assert found.chosen == chosen, "and what the second one has loaded does not replace what the first one found"
    assert (found.bad, found.slow, found.searched) == ({"bad a"}, {"slow b"}, {"decode 1", "decode 2"})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"chosen": {"a": 5}, "bad": [], "searched": []}', '{"chosen": {}}'])
def test_a_damaged_file_is_said_and_not_used(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "choices.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        choices = load_choices(path)
    assert not choices.chosen and not choices.searched
    assert "tinyvllm tune" in caplog.text


def test_digests_name_choices() -> None:
    four, eight = (("warps", 4),), (("warps", 8),)
    made: list[dict[str, tuning.Chosen]] = [{}, {"a": four}, {"a": eight}, {"b": four}]
    assert len({Choices(chosen=chosen).digest for chosen in made}) == 4
    assert Choices(chosen={"a": four, "b": eight}).digest == Choices(chosen={"b": eight, "a": four}).digest
    assert Choices(chosen={"a": four, "b": ()}).digest == Choices(chosen={"a": four}).digest, "kept steps stay valid"


def test_combinations_are_each_value_once_and_the_fastest_by_prediction_first() -> None:
    fields = dict(name="down", lanes=Lanes("CUDA"), format=Format("float16", 16), num_rows=4096, num_cols=14336)
    first, *others = combinations(VectorSpec(**fields))  # type: ignore[arg-type]
    times = [other.predicted_s or 0.0 for other in others]
    assert times == sorted(times)
    every = [one.values for one in (first, *others)]
    assert len(set(every)) == len(every) > 100
    assert all(one.is_possible() for one in others)
    small = make_spec(6)  # a kernel of a CPU, without predictions
    assert [one.values for one in combinations(small)] == [(("rows_per_pass", rows),) for rows in (3, 2, 1)]
