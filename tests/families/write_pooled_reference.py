"""Write data/qwen3_pooled.json: what transformers' classes say of the models of pooled_models.py, in float32, with the
code of the model cards of Qwen3-Embedding and Qwen3-Reranker.

Nothing of tinyvllm computes anything here. With the extra `oracle`: python -m tests.families.write_pooled_reference
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers

from tests.families.pooled_models import (
    ANSWERS,
    DOCUMENTS,
    QUERY,
    TEXTS,
    write_classifier,
    write_embedder,
    write_reranker,
)

OUTPUT = Path(__file__).parent / "data" / "qwen3_pooled.json"
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def main() -> None:
    import torch
    import transformers

    torch.set_grad_enabled(False)

    def load(family: Any, path: Path) -> tuple[Any, tokenizers.Tokenizer]:
        model = family.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        return model, tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))

    def prompts(tokenizer: tokenizers.Tokenizer) -> list[list[int]]:
        asked = [f"<Instruct>: {INSTRUCTION}\n<Query>: {QUERY}\n<Document>: {text}" for text in DOCUMENTS]
        return [tokenizer.encode(PREFIX + text + SUFFIX).ids for text in asked]

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load(transformers.Qwen3Model, write_embedder(Path(folder) / "embedder").path)
        embeddings = []
        for text in TEXTS:
            state = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0, -1]
            embeddings.append(torch.nn.functional.normalize(state, dim=0).tolist())
        model, tokenizer = load(transformers.Qwen3ForCausalLM, write_reranker(Path(folder) / "reranker").path)
        scores = []
        for ids in prompts(tokenizer):
            logits = model(torch.tensor([ids])).logits[0, -1, [ANSWERS["no"], ANSWERS["yes"]]]
            scores.append(torch.softmax(logits.double(), 0)[1].item())
        family = transformers.Qwen3ForSequenceClassification
        model, tokenizer = load(family, write_classifier(Path(folder) / "classifier").path)
        classified = [model(torch.tensor([ids])).logits.double().sigmoid().item() for ids in prompts(tokenizer)]
    about = f"By transformers {version('transformers')}, torch {version('torch')}"
    found = {"about": about, "embeddings": embeddings, "reranker": scores, "classifier": classified}
    OUTPUT.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(f"wrote {OUTPUT}: {scores} {classified}")


if __name__ == "__main__":
    main()
