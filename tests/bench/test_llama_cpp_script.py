"""scripts/bench_llama_cpp.py, with a llama.cpp whose times are known."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from tinyvllm.config import ModelFiles

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_llama_cpp.py"
PROMPT_MS, STEP_MS = 50.0, 2.0


class FakeServer:
    """The first token costs no generation time, as in llama.cpp: the prompt's step samples it."""

    started: ClassVar[list[tuple[int, int]]] = []  # slots and tokens of the context

    def __init__(self, params: Any) -> None:
        self.started.append((params.n_parallel, params.n_ctx))

    def handle_completions(self, body: dict[str, Any]) -> dict[str, Any]:
        count = body["n_predict"]
        assert all(0 <= token_id < 260 for token_id in body["prompt"]) and not body["cache_prompt"]
        return {
            "timings": {
                "prompt_n": len(body["prompt"]),
                "prompt_ms": PROMPT_MS,
                "predicted_n": count,
                "predicted_ms": (count - 1) * STEP_MS,
            }
        }


def make_params() -> SimpleNamespace:
    return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "xllamacpp", SimpleNamespace(Server=FakeServer, CommonParams=make_params))
    monkeypatch.setattr(FakeServer, "started", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("bench_llama_cpp", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "describe_environment", lambda seed, library: {"seed": seed, "library": library})
    return module


def test_rows_are_those_of_bench_latency(
    script: ModuleType,
    tiny_gguf_files: ModelFiles,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = "--prefill 100 --context 20 --tokens 8 --repeats 3 --parallel 4 --json -"
    monkeypatch.setattr(sys, "argv", ["bench_llama_cpp.py", str(tiny_gguf_files.path), *flags.split()])
    script.main()
    prefill, decode, parallel = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (prefill["phase"], prefill["test"], prefill["step_ms_median"]) == ("prefill", "pp100", PROMPT_MS)
    assert prefill["tok_s"] == pytest.approx(100 / PROMPT_MS * 1e3)
    assert (decode["phase"], decode["batch"], decode["context"], decode["repeats"]) == ("decode", 1, 20, 3)
    assert decode["step_ms_median"] == pytest.approx(STEP_MS)  # 9 tokens, 8 steps
    assert decode["tok_s"] == pytest.approx(1e3 / STEP_MS)
    assert (parallel["batch"], parallel["test"]) == (4, "tg8 @ d20, batch 4")
    assert decode["environment"]["library"] == "xllamacpp"
    assert FakeServer.started == [(1, 256), (1, 256), (4, 1024)]
