"""scripts/bench_mlx.py, with an mlx-lm whose steps take a known time."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_mlx.py"
PREFILL_S, STEP_S = 0.5, 0.02
CONFIG = {"vocab_size": 300, "quantization": {"bits": 4, "group_size": 64}}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    clock = Clock()

    def generate_step(prompt: list[int], model: Any, *, max_tokens: int) -> Iterator[tuple[int, None]]:
        assert all(0 <= token_id < 300 for token_id in prompt)
        for number in range(max_tokens):
            clock.now_s += STEP_S if number else PREFILL_S
            yield 7, None

    array = SimpleNamespace(nbytes=1000, dtype="mlx.core.uint32")
    core = SimpleNamespace(array=list, cpu="cpu", float32="float32", default_device=lambda: "cpu")
    dtypes: list[str] = []
    model = SimpleNamespace(parameters=dict, set_dtype=dtypes.append)
    modules = {
        "mlx": SimpleNamespace(core=core),
        "mlx.core": core,
        "mlx.utils": SimpleNamespace(tree_flatten=lambda tree: [("weight", array)]),
        "mlx_lm": SimpleNamespace(),
        "mlx_lm.generate": SimpleNamespace(generate_step=generate_step),
        "mlx_lm.utils": SimpleNamespace(
            get_total_parameters=lambda model: 2000,
            load_model=lambda path: (model, CONFIG),
        ),
    }
    for name, fake in modules.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("bench_mlx", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "describe_environment", lambda seed, library: {"seed": seed, "library": library})
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    monkeypatch.setattr(module, "test_dtypes", dtypes, raising=False)
    return module


def test_rows_are_those_of_bench_latency(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--prefill 100 --context 20 --tokens 8 --repeats 3 --json -"
    monkeypatch.setattr(sys, "argv", ["bench_mlx.py", "/models/tiny-mlx-4", *flags.split()])
    script.main()
    assert script.test_dtypes == ["float32"]  # float16 would be computed in software
    prefill, decode = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (prefill["kind"], prefill["test"], prefill["model"]) == ("latency", "pp100", "tiny-mlx-4 (mlx-lm)")
    assert prefill["tok_s"] == pytest.approx(100 / PREFILL_S) and prefill["dtype"] == "mlx-4bit-g64"
    assert (decode["test"], decode["steps"], decode["repeats"]) == ("tg8 @ d20", 24, 3)
    assert decode["step_ms_median"] == pytest.approx(1e3 * STEP_S)
    assert decode["tok_s"] == pytest.approx(1 / STEP_S)
    assert (decode["params"], decode["model_bytes"], decode["environment"]["library"]) == (2000, 1000, "mlx")
