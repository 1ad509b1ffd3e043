"""Write tests/data/smollm2_reference.json: the output of an implementation that shares no code with ours.

It is transformers' LlamaForCausalLM in float32 on the CPU, with weights dequantized by the `gguf` package. Imports
nothing from tinyvllm. The prompts' token ids are llama.cpp's (package xllamacpp), and must agree with transformers'
version of the file's tokenizer. llama.cpp's greedy tokens, from the same weights in float32, are compared too.

    pip install 'tinyvllm[oracle]' xllamacpp
    python scripts/make_reference.py MODEL.gguf
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

NUM_STEPS = 64
NUM_TOP = 5
OUTPUT = Path(__file__).parent.parent / "tests" / "data" / "smollm2_reference.json"

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chat(*turns: str, system: str = SYSTEM) -> str:
    """The model's chat format, spelled out. Turns alternate between user and assistant; the last is the user's."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for i, turn in enumerate(turns):
        text += f"<|im_start|>{'assistant' if i % 2 else 'user'}\n{turn}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


LIGHTHOUSE = """\
The lighthouse at Harrow Point was built in 1874, after three ships were lost on the reef in one winter. Its \
tower is thirty-one metres high, of grey granite that was cut on the mainland, numbered stone by stone, and \
carried over in barges whenever the sea allowed it. Four keepers lived there with their families. They grew \
potatoes behind the wall, kept two goats, and rowed to the village once a week for flour, oil and letters.

The first lamp burned rapeseed oil behind a lens of the second order, and could be seen at eighteen miles on a \
clear night. In 1911 it was changed to paraffin vapour, in 1938 to electricity from a diesel engine, and in 1986 \
the last keeper switched on the automatic lamp, locked the door and took the boat home. The log books that he \
left behind fill a shelf of four metres. On most days they say no more than the wind, the height of the \
barometer, and the hours for which the lamp was lit; but on the ninth of February 1903 the keeper of the watch \
wrote a whole page, in a hand that grows worse from line to line, about a steamer that came so close under the \
tower that he could hear the men on her deck.

Today the tower belongs to a trust. Visitors climb its 144 steps in summer, and students from the college count \
the seabirds that nest on the ledges below the gallery. The trust pays for the paint, the village for the path, \
and the harbour for the lamp itself, which still turns every evening although every ship that passes carries a \
satellite receiver. Asked why they keep it, the harbour master says that a light costs little, and that it has \
never been out of order when the other thing was.

In short, the lighthouse was"""

PROMPTS: dict[str, str] = {
    "one token": "The",
    "plain": "The capital of France is",
    "chat": chat("What is the capital of France? Answer in one sentence."),
    "chat of three turns": chat(
        "Name a fruit that is yellow.", "A banana is a fruit that is yellow.", "And one that is red? Say how it tastes."
    ),
    "chat with a system text": chat("How do I boil an egg?", system="You answer in short numbered steps."),
    "code": 'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
    "code with tabs": 'package main\n\nimport "fmt"\n\nfunc main() {\n\tfor i := 0; i < 10; i++ {\n\t\t',
    "numbers": "Squares: 12 * 12 = 144, 13 * 13 = 169, 14 * 14 = 196, 15 * 15 = 225, 16 * 16 =",
    "dates and decimals": "Date,Price\n2023-01-05,1203.50\n2023-01-06,1207.25\n2023-01-07,1211.00\n2023-01-08,",
    "chinese": "人工智能是计算机科学的一个分支，它",
    "accents and emoji": "Café menu ☕🥐 — crème brûlée: 4,50 €; naïve Übergröße 🙂👍🏽\nTranslation into English:",
    "repetitive": "tick tock " * 24,
    "list": "A shopping list for a birthday party:\n\n1. Balloons\n2. Candles\n3.",
    "chat with code": chat("Write a Python function that reverses a string, and explain it."),
    "long": LIGHTHOUSE,
}


def load_tokenizer(path: Path) -> Any:
    """transformers' version of the file's tokenizer, with the splits of SmolLM2's tokenizer.json, which it leaves
    out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def unpermute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo the row order of llama.cpp's converter, which stores the pairs (i, i + D/2) of a head side by side."""
    rows, columns = weights.shape
    paired = weights.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)


def read_weights(reader: gguf.GGUFReader, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Every tensor of the file in float32, under transformers' names."""
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    weights = {}
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = whole.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            if part in ("attn_q", "attn_k"):
                array = unpermute(array, num_heads if part == "attn_q" else num_kv_heads)
            name = f"model.layers.{layer}.{parts[part]}.weight"
        weights[name] = torch.from_numpy(np.ascontiguousarray(array))
    return weights


def load_model(reader: gguf.GGUFReader) -> transformers.LlamaForCausalLM:
    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    missing, surplus = model.load_state_dict(read_weights(reader, heads, kv_heads), strict=False)
    assert missing in ([], ["lm_head.weight"]) and not surplus, f"{missing=} {surplus=}"
    model.tie_weights()
    return model


def generate(model: transformers.LlamaForCausalLM, prompt_ids: list[int]) -> dict[str, Any]:
    """NUM_STEPS greedy tokens, ignoring EOS, each with the NUM_TOP most likely tokens and the gap between the first
    two."""
    output_ids: list[int] = []
    top_ids, top_logprobs, gaps = [], [], []
    result = model(torch.tensor([prompt_ids]), use_cache=True)
    for _ in range(NUM_STEPS):
        logits = result.logits[0, -1].double()
        values, ids = torch.log_softmax(logits, dim=-1).topk(NUM_TOP)
        top_ids.append(ids.tolist())
        top_logprobs.append([round(value, 6) for value in values.tolist()])
        gaps.append(round(float(values[0] - values[1]), 6))
        output_ids.append(int(ids[0]))
        result = model(ids[:1].view(1, 1), past_key_values=result.past_key_values, use_cache=True)
    return {
        "output_ids": output_ids,
        "smallest_gap": min(gaps),
        "gaps": gaps,
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
    }


def write_float32(reader: gguf.GGUFReader, path: Path) -> None:
    """The same model with every tensor in float32, so that llama.cpp does not round activations to eight bits."""
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A llama.cpp server in this process, called over HTTP on its loopback address."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 2048
        params.n_parallel = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + route, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._post("/tokenize", {"content": text, "parse_special": True})["tokens"]
        return ids

    def generate(self, prompt_ids: list[int], eos_id: int) -> list[int]:
        """NUM_STEPS greedy tokens. It stops at EOS, since its ignore_eos would ban the token, so it is asked to
        continue."""
        ids: list[int] = []
        while len(ids) < NUM_STEPS:
            body = {"prompt": prompt_ids + ids, "n_predict": NUM_STEPS - len(ids), "temperature": 0.0}
            answer = self._post("/completion", body | {"return_tokens": True, "cache_prompt": False})
            ids += answer["tokens"]
            if answer["stop_type"] == "eos" and answer["tokens"][-1:] != [eos_id]:
                ids.append(eos_id)
        return ids[:NUM_STEPS]


def count_equal(a: list[int], b: list[int]) -> int:
    """The number of leading tokens that agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the default model's GGUF file")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    reader = gguf.GGUFReader(args.model)
    tokenizer = load_tokenizer(args.model)
    model = load_model(reader)
    with tempfile.TemporaryDirectory() as folder:
        write_float32(reader, Path(folder) / "float32.gguf")
        llama_cpp = LlamaCpp(Path(folder) / "float32.gguf")
        prompts = []
        for name, text in PROMPTS.items():
            prompt_ids = llama_cpp.encode(text)
            assert prompt_ids == tokenizer(text)["input_ids"], f"the tokenizers disagree on {name!r}"
            assert tokenizer.decode(prompt_ids) == text, f"{name!r} does not survive encode and decode"
            record = {"name": name, "text": text, "prompt_ids": prompt_ids, **generate(model, prompt_ids)}
            others = llama_cpp.generate(prompt_ids, tokenizer.eos_token_id)
            record["llama_cpp_equal"] = count_equal(record["output_ids"], others)
            record["output_text"] = tokenizer.decode(record["output_ids"])
            prompts.append(record)
            print(f"{name:26}{len(prompt_ids):5} prompt tokens  smallest gap {record['smallest_gap']:.6f}  "
                  f"llama.cpp equal {record['llama_cpp_equal']}/{NUM_STEPS}")  # fmt: skip
    header = {
        "about": "Greedy tokens of the default model in float32, EOS not heeded. Written by scripts/make_reference.py.",
        "model_sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        "implementation": f"transformers {version('transformers')}, torch {version('torch')}, gguf {version('gguf')}",
        "second_implementation": f"llama.cpp in xllamacpp {version('xllamacpp')}, weights and KV cache in float32",
        "llama_cpp_equal": f"{sum(p['llama_cpp_equal'] for p in prompts)} of {NUM_STEPS * len(prompts)} tokens",
        "smallest_gap": min(p["smallest_gap"] for p in prompts),
        "num_steps": NUM_STEPS,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(json.dumps(p, ensure_ascii=False, separators=(",", ":")) for p in prompts)
    args.output.write_text(json.dumps(header, indent=1)[:-2] + f',\n "prompts": [\n{body}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
