"""Write data/gemma3_270m.json: what transformers' Gemma3ForCausalLM says with the catalog's file, dequantized to
float32, and llama.cpp's token ids of hard strings.

Nothing of tinyvllm computes anything here. With the extra `oracle`, and xllamacpp:
python -m tests.families.write_gemma3_270m_reference MODEL.gguf
"""

from __future__ import annotations

import json
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_tokenizer_reference.py"
OUTPUT = Path(__file__).parent / "data" / "gemma3_270m.json"
PROMPTS = {
    "chat": "<start_of_turn>user\nWhat is the capital of France?<end_of_turn>\n<start_of_turn>model\n",
    "prose": "The history of the lighthouse begins in",
    "code": 'def fibonacci(n: int) -> int:\n    """Return the n-th number of Fibonacci."""\n',
    "numbers": "1, 1, 2, 3, 5, 8, 13, 21,",
    "table": "| year | event |\n|---|---|\n| 1969 |",
    "german": "Die Hauptstadt von Österreich ist",
    "japanese": "日本の首都は",
    "arabic": "عاصمة مصر هي",
    "emoji": "🍎 is an apple, 🍌 is a banana, 🍇 is",
}
FURTHER_TEXTS = (
    "    indented\n\tcode",
    "a  b   c    d",
    "\n\n\n\nx\n\n",
    PROMPTS["chat"],
    "<bos>hi<eos>",
    "<unused5> <mask> [multimodal]",
    "<h1>html</h1> <table>",
    "😀😃 ☃ 🤷‍♀️ 𐍈",
    "\t\t\t",
    "  \n  \n",
    "a\n \n\nb",
    "▁▁a ▁",
    "<unk><pad>",
    "a" * 32,
    "======----####",
)
NUM_STEPS, NUM_TOP = 64, 3
LEAST_GAP = 0.004  # between the two likeliest logprobs: where they are nearer, the case ends


def load(path: Path) -> Any:
    """The class of the checkpoint's own config, with the file's values. GGUF has 1 added to Gemma's norms."""
    import torch
    import transformers

    reader = gguf.GGUFReader(path)
    keys = {
        name.removeprefix("gemma3."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("gemma3.")
    }
    config = transformers.Gemma3TextConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=keys["embedding_length"],
        intermediate_size=keys["feed_forward_length"],
        num_hidden_layers=keys["block_count"],
        num_attention_heads=keys["attention.head_count"],
        num_key_value_heads=keys["attention.head_count_kv"],
        head_dim=keys["attention.key_length"],
        max_position_embeddings=keys["context_length"],
        sliding_window=keys["attention.sliding_window"],
        attn_implementation="eager",
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, parameter in model.named_parameters():
        found = names.get_name(name, try_suffixes=(".weight",))
        tensor = tensors.pop("token_embd.weight" if name == "lm_head.weight" else str(found))
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        parameter.copy_(values.reshape(parameter.shape) - (1.0 if parameter.ndim == 1 else 0.0))
    assert not tensors, f"not used: {sorted(tensors)}"
    return model


def main(path: Path) -> None:
    import torch

    torch.set_grad_enabled(False)
    tools = runpy.run_path(str(SCRIPT))
    server = tools["LlamaCpp"](path)
    texts = [
        [text, special, server.encode(text, add_special=True, parse_special=special)]
        for text in (*tools["TEXTS"], *FURTHER_TEXTS)
        for special in (True, False)
    ]
    model = load(path)
    cases = []
    for name, prompt in PROMPTS.items():
        prompt_ids = server.encode(prompt, add_special=True, parse_special=True)
        cases.append({"name": name, "prompt": prompt, "prompt_ids": prompt_ids, **continue_greedily(model, prompt_ids)})
    versions = f"transformers {version('transformers')}, torch {version('torch')}, xllamacpp {version('xllamacpp')}"
    head = json.dumps({"about": f"Of the catalog's gemma-3-270m, by {versions}"})[:-1]
    lines = [",\n".join(json.dumps(item, separators=(",", ":")) for item in items) for items in (cases, texts)]
    OUTPUT.write_text(f'{head},\n"cases": [\n{lines[0]}\n],\n"texts": [\n{lines[1]}\n]}}\n', encoding="utf-8")
    print(f"wrote {OUTPUT}")


def continue_greedily(model: Any, prompt_ids: list[int]) -> dict[str, Any]:
    import torch

    ids, cache, tokens, top = list(prompt_ids), None, [], []
    for _ in range(NUM_STEPS):
        output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        values, best = torch.log_softmax(output.logits[0, -1].double(), dim=-1).topk(NUM_TOP)
        if values[0] - values[1] < LEAST_GAP:
            break
        top.append([[int(i), round(float(v), 4)] for i, v in zip(best, values, strict=True)])
        tokens.append(int(best[0]))
        ids = [int(best[0])]
    print(f"{len(tokens)} tokens, {len(set(tokens))} kinds, after {prompt_ids[:8]}")
    return {"tokens": tokens, "top": top}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
