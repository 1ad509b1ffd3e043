"""Write data/mtp.json: what drafts transformers' layer gives in the place of Qwen3.5's own (MTP), in float32.

The layer is transformers' decoder layer of attention, between this page's norms and products, which are those of vLLM's
qwen3_next_mtp.py. Nothing of tinyvllm computes anything. With the extra `oracle`:
python -m tests.execution.write_mtp_reference
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.families.mtp import ATTENTION_LAYER, mtp_weights, write_hf_with_mtp
from tests.families.recipes import RECIPES
from tests.families.write_references import weights_sum

DATA = Path(__file__).parent / "data" / "mtp.json"
PROMPTS = ("ab", "two are company, three are none, and four are a crowd")
NUM_STEPS, NUM_DRAFTS, NUM_TOP = 12, 3, 3


class Drafting:
    """The drafting layer beside transformers' model."""

    def __init__(self, model: Any, weights: dict[str, Any]) -> None:
        import torch
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

        config = model.config
        self.model, self.fc = model, torch.tensor(weights["mtp.fc.weight"])
        prefix = "mtp.layers.0."
        self.layer = Qwen3_5DecoderLayer(config, ATTENTION_LAYER).eval()
        own = {name.removeprefix(prefix): torch.tensor(w) for name, w in weights.items() if name.startswith(prefix)}
        self.layer.load_state_dict(own)
        self.norms = {}
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            self.norms[name] = Qwen3_5RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.norms[name].weight.copy_(torch.tensor(weights[f"mtp.{name}.weight"]))

    def run(self, tokens: list[int], hidden: Any) -> Any:
        """(rows, hidden): the normed output of the rows of these tokens, with these hidden states."""
        import torch

        embedded = self.norms["pre_fc_norm_embedding"](self.model.model.embed_tokens(torch.tensor(tokens)))
        x = torch.cat([embedded, self.norms["pre_fc_norm_hidden"](hidden)], dim=-1) @ self.fc.T
        count = len(tokens)
        positions = self.model.model.rotary_emb(x[None], torch.arange(count).expand(3, 1, count))
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
        return self.norms["norm"](self.layer(x[None], position_embeddings=positions, attention_mask=mask)[0])

    def draft(self, ids: list[int], hidden: Any) -> list[dict[str, Any]]:
        """Drafts after `ids`, of which all but the last have these hidden states."""
        import torch

        tokens, drafts = ids[1:], []
        for _ in range(NUM_DRAFTS):
            out = self.run(tokens, hidden)
            logprobs = torch.log_softmax(self.model.lm_head(out[-1]).double(), dim=-1)
            values, best = logprobs.topk(NUM_TOP)
            drafts.append({"token": int(best[0]), "top": [round(float(value), 4) for value in values]})
            tokens, hidden = [*tokens, int(best[0])], torch.cat([hidden, out[-1:]])
        return drafts


def main() -> None:
    import torch
    import transformers

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    recipe = RECIPES["qwen3_5"]
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_hf_with_mtp(Path(folder) / "tiny", recipe)
        family = getattr(transformers, recipe.hf_class)
        model = family.from_pretrained(files.path, dtype=torch.float32, attn_implementation="eager").eval()
    drafting = Drafting(model, mtp_weights(recipe))
    for prompt in PROMPTS:
        ids = list(prompt.encode())
        steps: list[dict[str, Any]] = []
        for _ in range(NUM_STEPS):
            hidden = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            ids.append(int(model.lm_head(hidden[-1]).argmax()))
            steps.append({"token": ids[-1], "drafts": drafting.draft(ids, hidden)})
        gaps = [draft["top"][0] - draft["top"][1] for step in steps for draft in step["drafts"]]
        print(f"{prompt!r}: smallest gap {min(gaps):.4f}: {[[d['token'] for d in step['drafts']] for step in steps]}")
        cases.append({"prompt": prompt, "steps": steps})
    about = f"Drafts by transformers {version('transformers')}, torch {version('torch')}"
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps({"about": about, "weights_sum": weights_sum(recipe), "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
