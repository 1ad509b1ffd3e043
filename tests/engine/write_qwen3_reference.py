"""Write data/qwen3_reference.json: what transformers' Qwen3ForCausalLM says of a tiny seeded model, in float32.

Nothing of tinyvllm computes anything here. With the extra `oracle`: python -m tests.engine.write_qwen3_reference
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.builders import TinyLlama, make_weights, write_tiny_hf_llama

OUTPUT = Path(__file__).parent / "data" / "qwen3_reference.json"
NUMBERS: dict[str, Any] = {
    "family": "qwen3",
    "layers": 3,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie": False,  # a tied head of so few weights repeats itself
    "seed": 8,
}
PROMPTS = (
    "The",
    "two are company, three are none",
    "two are company, three are a crowd",  # begins like the one before
    "0123456789",
    "a prompt of more tokens than a chunk of the smallest bucket has, so that it is cut into pieces; and a rest",
)
NUM_STEPS, NUM_TOP = 24, 5
LEAST_GAP = 0.004  # between the two likeliest logprobs: what sums in another order do not turn round


def weights_sum() -> float:
    """Of the model's weights, by which a test knows that it draws the same."""
    return sum(float(abs(weight).astype("float64").sum()) for weight in make_weights(TinyLlama(**NUMBERS)).values())


def generate(model: Any, prompt: str, num_steps: int, num_top: int) -> dict[str, Any]:
    """One prompt's greedy tokens, and the likeliest logprobs at each."""
    import torch

    ids, tokens, top, gap = list(prompt.encode()), [], [], 1e9
    for _ in range(num_steps):
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), dim=-1)
        values, best = logprobs.topk(num_top)
        gap = min(gap, float(values[0] - values[1]))
        top.append([[int(i), round(float(v), 6)] for i, v in zip(best, values, strict=True)])
        tokens.append(int(best[0]))
        ids.append(int(best[0]))
    print(f"{prompt[:30]!r}: {len(set(tokens))} kinds of tokens, smallest gap {gap:.4f}: {tokens}")
    assert gap >= LEAST_GAP, "choose another seed"
    return {"prompt": prompt, "tokens": tokens, "top": top}


def main() -> None:
    import torch
    import transformers

    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        files = write_tiny_hf_llama(Path(folder) / "tiny", **NUMBERS)
        model = transformers.Qwen3ForCausalLM.from_pretrained(files.path, dtype=torch.float32).eval()
    cases = [generate(model, prompt, NUM_STEPS, NUM_TOP) for prompt in PROMPTS]
    versions = f"transformers {version('transformers')}, torch {version('torch')}"
    body = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    about = f"Greedy tokens and the likeliest logprobs by {versions}"
    head = json.dumps({"about": about, "weights_sum": weights_sum()}, indent=1)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(head[:-2] + f',\n "cases": [\n{body}\n]}}\n', encoding="utf-8")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
