"""The same shape through PyTorch: transformers with a static cache and torch.compile, as rows of tinyvllm's benchmarks.

    pip install torch transformers rich    # in an environment of its own
    python scripts/bench_transformers.py --shape llama-3.2-1b --batch 1,8,64 --context 128 --json transformers.json
    python scripts/bench_transformers.py --shape llama-3.2-1b --batch "" --requests 256 --context 128 --output-len 128

Random float16 weights, greedy. A step is the difference of two generations that differ in `--tokens` tokens, over
`--tokens`, so that prompts and start-up fall out; the first pair, in which torch compiles, is not counted. `--requests`
runs transformers' continuous batching instead (a paged cache, CUDA graphs), as `tinyvllm bench throughput` runs ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tinyvllm need not be installed here

from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.rows import Machine, Row
from tinyvllm.bench.shapes import find_shape
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.tables import markdown_table
from tinyvllm.config import ModelConfig

NUM_FIRST = 16  # tokens of the shorter generation


def main() -> None:
    args = parse_arguments()
    shape = find_shape(args.shape)
    model = make_model(shape, args.device, args.seed)
    machine = describe(shape, model, args)
    rows = [measure_prefill(model, machine, length, args) for length in args.prefill]
    for batch in args.batch:
        rows += [measure_decode(model, machine, batch, context, args) for context in args.context]
    if args.requests:
        rows += [measure_throughput(model, machine, context, args) for context in args.context]
    print(markdown_table(rows))
    text = json.dumps([row.as_json() for row in rows])
    if args.json == "-":
        print(text)
    elif args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode and prefill with transformers, as rows of tinyvllm's benches.")
    counts: dict[str, Any] = {"type": lambda text: [int(part) for part in text.split(",") if part], "metavar": "COUNTS"}
    parser.add_argument("--shape", default="llama-3.2-1b", help="as `tinyvllm bench latency --shape`")
    parser.add_argument("--batch", default=[1, 8, 64], help="sequences that decode at once", **counts)
    parser.add_argument("--context", default=[128], help="tokens of each prompt", **counts)
    parser.add_argument("--prefill", default=[], help="prompt lengths", **counts)
    parser.add_argument("--tokens", type=int, default=128, help="decode steps in a repeat")
    parser.add_argument("--requests", type=int, default=0, help="requests at once, with continuous batching")
    parser.add_argument("--output-len", type=int, default=128, help="tokens that each of --requests generates")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the rows; -: as the last line of stdout")
    return parser.parse_args()


def make_model(shape: ModelConfig, device: str, seed: int) -> LlamaForCausalLM:
    """Random float16 weights on the device."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tie_embeddings,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.float16).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def describe(shape: ModelConfig, model: LlamaForCausalLM, args: argparse.Namespace) -> Machine:
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return Machine(
        model=shape.name,
        dtype="float16",
        num_params=sum(tensor.numel() for tensor in model.parameters()),
        model_bytes=num_bytes,
        device=f"{name}, transformers",
        bandwidth_gbps=None,
        environment=describe_environment(args.seed, library="torch"),
    )


def generate(model: LlamaForCausalLM, ids: torch.Tensor, num_tokens: int) -> float:
    """Seconds of a greedy generation of exactly so many tokens."""
    wait(ids)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            cache_implementation="static",
        )
    wait(ids)
    return time.perf_counter() - start


def wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def prompts(model: LlamaForCausalLM, batch: int, length: int) -> torch.Tensor:
    """(batch, length) random ids."""
    return torch.randint(10, model.config.vocab_size - 10, (batch, length), device=model.device)


def measure_decode(
    model: LlamaForCausalLM, machine: Machine, batch: int, context: int, args: argparse.Namespace
) -> Row:
    ids, steps = prompts(model, batch, context), []
    for repeat in range(-1, args.repeats):
        # a static cache is as long as the longest generation so far: the longer one first
        longer_s = generate(model, ids, NUM_FIRST + args.tokens)
        shorter_s = generate(model, ids, NUM_FIRST)
        if repeat >= 0:
            steps.append((longer_s - shorter_s) / args.tokens)
    name = f"tg{args.tokens} @ d{context}" + (f", batch {batch}" if batch > 1 else "")
    return Row(
        test=name,
        phase="decode",
        batch=batch,
        context=context,
        num_tokens=args.tokens,
        machine=machine,
        tok_s=Spread.of([batch / step_s for step_s in steps]),
        step_ms=Spread.of([step_s * 1e3 for step_s in steps]),
    )


def measure_prefill(model: LlamaForCausalLM, machine: Machine, length: int, args: argparse.Namespace) -> Row:
    """One forward pass of a prompt, without a cache, and its last token's logits."""
    ids, times = prompts(model, 1, length), []
    for repeat in range(-2, args.repeats):
        wait(ids)
        start = time.perf_counter()
        with torch.inference_mode():
            model(ids, use_cache=False, logits_to_keep=1)
        wait(ids)
        if repeat >= 0:
            times.append(time.perf_counter() - start)
    return Row(
        test=f"pp{length}",
        phase="prefill",
        batch=1,
        context=0,
        num_tokens=length,
        machine=machine,
        tok_s=Spread.of([length / seconds for seconds in times]),
        step_ms=Spread.of([seconds * 1e3 for seconds in times]),
    )


def measure_throughput(model: LlamaForCausalLM, machine: Machine, context: int, args: argparse.Namespace) -> Row:
    """All requests are there at the start. The clock runs from the first one's arrival to the last token, so that
    making the cache and its graphs falls out; the first round is not counted."""
    config = GenerationConfig(do_sample=False, max_new_tokens=args.output_len, eos_token_id=-1, pad_token_id=0)
    inputs = prompts(model, args.requests, context).tolist()
    walls, gaps = [], []
    for repeat in range(-1, args.repeats):
        outputs = list(model.generate_batch(inputs, generation_config=config, record_timestamps=True).values())
        check_outputs(outputs, args)
        if repeat >= 0:
            walls.append(max(out.timestamps[-1] for out in outputs) - min(out.created_time for out in outputs))
            gaps += [after - before for out in outputs for before, after in itertools.pairwise(out.timestamps)]
    num_out = args.requests * args.output_len
    return Row(
        test=f"pp{context}+tg{args.output_len}, {args.requests} requests",
        phase="throughput",
        batch=args.requests,
        context=context,
        num_tokens=args.output_len,
        machine=machine,
        tok_s=Spread.of([num_out / wall_s for wall_s in walls]),
        step_ms=Spread.of([gap_s * 1e3 for gap_s in gaps]),
        more={"requests": args.requests, "wall_s": Spread.of(walls)},
    )


def check_outputs(outputs: list[Any], args: argparse.Namespace) -> None:
    lengths = {len(out.generated_tokens) for out in outputs}
    if len(outputs) != args.requests or lengths != {args.output_len}:
        raise SystemExit(
            f"transformers answered {len(outputs)} of {args.requests} requests, with {sorted(lengths)} tokens, "
            f"where each was to have {args.output_len}: its log says why"
        )


if __name__ == "__main__":
    main()
