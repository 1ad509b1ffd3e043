"""Write data/NAME.json for each of the recipes: what transformers' own class says of the tiny model, in float32.

Nothing of tinyvllm computes anything here. With the extra `oracle`: python -m tests.families.write_references [NAME...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.families.recipe import Recipe, make_weights, write_hf
from tests.families.recipes import RECIPES

DATA = Path(__file__).parent / "data"
PROMPTS = (
    "The",
    "two are company, three are none",
    "two are company, three are a crowd",  # begins like the one before
    "0123456789",
    "a prompt of more tokens than a chunk of the smallest bucket has, so that it is cut into pieces; and a rest",
)
NUM_STEPS, NUM_TOP = 64, 3
LEAST_GAP = 0.003  # between the two likeliest logprobs: what sums in another order do not turn round


def weights_sum(recipe: Recipe) -> float:
    """Of the model's weights, by which a test knows that it draws the same."""
    return sum(float(abs(weight).astype("float64").sum()) for weight in make_weights(recipe).values())


def main(names: list[str]) -> None:
    import torch
    import transformers

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for name in names:
        recipe = RECIPES[name]
        with tempfile.TemporaryDirectory() as folder:
            files = write_hf(Path(folder) / "tiny", recipe)
            family = getattr(transformers, recipe.hf_class)
            model = family.from_pretrained(files.path, dtype=torch.float32, attn_implementation="eager").eval()
        cases = [continue_greedily(model, prompt) for prompt in PROMPTS]
        versions = f"transformers {version('transformers')}, torch {version('torch')}"
        write(DATA / f"{name}.json", f"Greedy tokens and the likeliest logprobs by {versions}", recipe, cases)


def continue_greedily(model: Any, prompt: str) -> dict[str, Any]:
    import torch

    ids, tokens, top, gap = list(prompt.encode()), [], [], 1e9
    for _ in range(NUM_STEPS):
        # the whole sequence each time, so that the oracle's own cache cannot be wrong
        logprobs = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0, -1].double(), dim=-1)
        values, best = logprobs.topk(NUM_TOP)
        gap = min(gap, float(values[0] - values[1]))
        top.append([[int(i), round(float(v), 5)] for i, v in zip(best, values, strict=True)])
        tokens.append(int(best[0]))
        ids.append(int(best[0]))
    print(f"{prompt[:30]!r}: {len(set(tokens))} kinds of tokens, smallest gap {gap:.4f}: {tokens}")
    assert gap >= LEAST_GAP, "choose another seed"
    return {"prompt": prompt, "tokens": tokens, "top": top}


def write(path: Path, about: str, recipe: Recipe, cases: list[dict[str, Any]]) -> None:
    body = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    head = json.dumps({"about": about, "weights_sum": weights_sum(recipe)}, indent=1)
    path.parent.mkdir(exist_ok=True)
    path.write_text(head[:-2] + f',\n "cases": [\n{body}\n]}}\n', encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(RECIPES))
