"""Write tests/clients/facts/scores.json: the log probability that transformers gives to each answer of the questions in
that directory.

Uses the same float32 model as scripts/make_reference.py, and its loader. Contexts and answers are split as in lm-eval:
both are encoded together, and the tokens after the context's own belong to the answer.

    pip install 'tinyvllm[oracle]' xllamacpp
    python scripts/make_scores_reference.py MODEL.gguf
"""

from __future__ import annotations

import argparse
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
from make_reference import load_model, load_tokenizer

FOLDER = Path(__file__).parent.parent / "tests" / "clients" / "facts"


def score(model: Any, tokenizer: Any, question: str, answer: str) -> tuple[float, bool]:
    """(the answer's log probability, whether each of its tokens is the most likely one)."""
    start = len(tokenizer(question)["input_ids"])
    ids = tokenizer(f"{question} {answer}")["input_ids"]
    logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    rows = logprobs[start - 1 : -1]
    chosen = rows[torch.arange(len(ids) - start), torch.tensor(ids[start:])]
    return float(chosen.sum()), bool((rows.argmax(-1) == torch.tensor(ids[start:])).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the default model's GGUF file")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    tokenizer, model = load_tokenizer(args.model), load_model(gguf.GGUFReader(args.model))
    questions = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [
        [score(model, tokenizer, question["question"], choice) for choice in question["choices"]]
        for question in questions
    ]
    best = [row.index(max(row, key=lambda scored: scored[0])) for row in scores]
    num_right = sum(index == question["answer"] for index, question in zip(best, questions, strict=True))
    header = {
        "about": "Log probabilities of the answers in float32. Written by scripts/make_scores_reference.py.",
        "model_sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        "implementation": f"transformers {version('transformers')}, torch {version('torch')}, gguf {version('gguf')}",
        "accuracy": num_right / len(questions),
        "scores": scores,
    }
    (FOLDER / "scores.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
