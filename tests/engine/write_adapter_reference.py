"""Write data/adapter_reference.json: what peft says of tiny seeded adapters of a tiny seeded Qwen3, in float32.

Nothing of tinyvllm computes anything here. In an environment with torch, transformers and peft (pip install peft):
python -m tests.engine.write_adapter_reference
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.adapters import ALL_MODULES, write_adapter
from tests.builders import TinyLlama, write_tiny_hf_llama
from tests.engine.write_qwen3_reference import NUMBERS, generate

OUTPUT = Path(__file__).parent / "data" / "adapter_reference.json"
PROMPTS = ("The", "two are company, three are a crowd, and four need a table of their own")
NUM_STEPS, NUM_TOP = 12, 4
# by name: arguments of `write_adapter`
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"modules": ("q_proj", "v_proj"), "rank": 8, "seed": 1, "lora_alpha": 12},
    "everything": {"modules": ALL_MODULES, "rank": 16, "seed": 2, "lora_alpha": 4, "use_rslora": True},
    "patterns": {
        "modules": ("o_proj", "gate_proj", "down_proj"),
        "rank": 4,
        "seed": 2,
        "ranks": {"down_proj": 6},
        "lora_alpha": 2,
        "alpha_pattern": {"layers.1.mlp.gate_proj": 5},
    },
}


def main() -> None:
    import peft
    import torch
    import transformers

    torch.set_grad_enabled(False)
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_tiny_hf_llama(Path(folder) / "tiny", **NUMBERS)
        for name, arguments in ADAPTERS.items():
            base = transformers.Qwen3ForCausalLM.from_pretrained(files.path, dtype=torch.float32).eval()
            path = write_adapter(Path(folder) / name, TinyLlama(**NUMBERS), **arguments)
            model = peft.PeftModel.from_pretrained(base, str(path)).eval()
            cases += [{"adapter": name, **generate(model, prompt, NUM_STEPS, NUM_TOP)} for prompt in PROMPTS]
    about = (
        f"Greedy tokens and the likeliest logprobs by peft {version('peft')}, transformers {version('transformers')}"
    )
    body = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    OUTPUT.write_text(f'{{"about": {json.dumps(about)}, "cases": [\n{body}\n]}}\n', encoding="utf-8")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
