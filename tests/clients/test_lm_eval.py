"""lm-eval over HTTP scores the default model as transformers does in its own process.

lm-eval uses only the server's completions and tokenizer routes, and works offline. tests/clients/facts has the
questions, and the scores that scripts/make_scores_reference.py computed with transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.clients, pytest.mark.model, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

FACTS = Path(__file__).parent / "facts"


def test_scores_are_those_of_transformers(server_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    import lm_eval

    task = {
        "task": "facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(FACTS / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "smol",
            "base_url": f"{server_url}/completions",
            "tokenizer_backend": "remote",
            "batch_size": 8,
            "max_length": 512,
        },
        tasks=[task],
        bootstrap_iters=0,
    )
    reference = json.loads((FACTS / "scores.json").read_text(encoding="utf-8"))
    assert found["results"]["facts"]["acc,none"] == reference["accuracy"]
    samples = sorted(found["samples"]["facts"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, reference["scores"], strict=True):
        for [[logprob, is_greedy]], (expected, was_greedy) in zip(sample["resps"], row, strict=True):
            assert float(logprob) == pytest.approx(expected, abs=0.02), sample["doc"]["question"]
            assert str(is_greedy) == str(was_greedy)
