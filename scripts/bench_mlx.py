"""Measure a directory in MLX's format with mlx-lm, as rows of `tinyvllm bench latency`, to compare with ours.

    pip install "mlx[cpu]" mlx-lm rich numpy     # in a separate environment; on a Mac: mlx-lm rich
    tinyvllm quantize smollm2-135m-instruct --to mlx-4 --out /tmp/smollm2-mlx-4     # one directory that both run
    python scripts/bench_mlx.py /tmp/smollm2-mlx-4 --json mlx.json
    tinyvllm bench latency /tmp/smollm2-mlx-4 --prefill 512 --context 128,1024 --batch 1 --json ours.json
    tinyvllm bench across ours.json mlx.json

Prompts are random ids from the same seed, sampling is greedy, and each case has one untimed repeat first. Both go
through mlx-lm's own generator (`generate_step`), which computes the next token while it hands out the last. A prompt's
time ends with its first token. A decode step's is the time between two tokens.

On a CPU activations and scales are float32, because MLX emulates float16 there in software: a step of SmolLM2-135M took
134 s instead of 1.6 s on two busy cores of an x86 machine. On a Mac's GPU they have the type of the files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import get_total_parameters, load_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tinyvllm need not be installed here

from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.rows import Machine, Row
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.tables import markdown_table


def main() -> None:
    args = parse_arguments()
    if args.cpu:
        mx.set_default_device(mx.cpu)
    model, config = load_model(args.model)
    if args.dtype or is_on_cpu():
        model.set_dtype(getattr(mx, args.dtype or "float32"))
    machine = describe(args, model, config)
    rows = [measure_prefill(args, model, config["vocab_size"], machine, length) for length in args.prefill]
    rows += [measure_decode(args, model, config["vocab_size"], machine, context) for context in args.context]
    print(markdown_table(rows))
    text = json.dumps([row.as_json() for row in rows])
    if args.json == "-":
        print(text)
    elif args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time decoding and prefill in mlx-lm, as rows of tinyvllm's benchmarks."
    )
    lengths: dict[str, Any] = {
        "type": lambda text: [int(part) for part in text.split(",") if part],
        "metavar": "LENGTHS",
    }
    parser.add_argument("model", type=Path, metavar="DIRECTORY")
    parser.add_argument("--prefill", default=[512], help="prompt lengths, such as 128,512", **lengths)
    parser.add_argument("--context", default=[128, 1024], help="tokens before the first decode step", **lengths)
    parser.add_argument("--tokens", type=int, default=32, metavar="COUNT", help="decode steps per repeat")
    parser.add_argument("--repeats", type=int, default=5, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=0, metavar="INTEGER")
    parser.add_argument(
        "--dtype", metavar="TYPE", help="of activations and scales: float32, float16 or bfloat16 [default: see above]"
    )
    parser.add_argument("--cpu", action="store_true", help="on a Mac: the CPU instead of the GPU")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON; -: as the last line of stdout")
    return parser.parse_args()


def describe(args: argparse.Namespace, model: Any, config: dict[str, Any]) -> Machine:
    """The facts that all rows share."""
    arrays = [array for _, array in tree_flatten(model.parameters())]
    quantization = config.get("quantization")
    stored = str(max(arrays, key=lambda array: array.nbytes).dtype).removeprefix("mlx.core.")
    return Machine(
        model=f"{args.model.name} (mlx-lm)",
        dtype=f"mlx-{quantization['bits']}bit-g{quantization['group_size']}" if quantization else stored,
        num_params=get_total_parameters(model),
        model_bytes=sum(array.nbytes for array in arrays),
        device="CPU" if is_on_cpu() else "METAL",
        bandwidth_gbps=None,
        environment=describe_environment(args.seed, library="mlx"),
    )


def is_on_cpu() -> bool:
    return bool(mx.default_device() == mx.cpu)


def measure_prefill(args: argparse.Namespace, model: Any, vocab_size: int, machine: Machine, length: int) -> Row:
    """A prompt until its first token."""
    rng, seconds = random.Random(args.seed), []
    for _ in range(1 + args.repeats):
        start_s = time.perf_counter()
        next(generate(model, rng, vocab_size, length, 1))
        seconds.append(time.perf_counter() - start_s)
    return Row(
        test=f"pp{length}",
        phase="prefill",
        batch=1,
        context=0,
        num_tokens=length,
        machine=machine,
        tok_s=Spread.of([length / value for value in seconds[1:]]),
        step_ms=Spread.of([value * 1e3 for value in seconds[1:]]),
    )


def measure_decode(args: argparse.Namespace, model: Any, vocab_size: int, machine: Machine, context: int) -> Row:
    """The steps between the first token of an answer and its last."""
    rng, repeats = random.Random(args.seed), []
    for _ in range(1 + args.repeats):
        times_s = [time.perf_counter() for _ in generate(model, rng, vocab_size, context, args.tokens + 1)]
        repeats.append([after - before for before, after in itertools.pairwise(times_s)])
    timed = repeats[1:]
    return Row(
        test=f"tg{args.tokens} @ d{context}",
        phase="decode",
        batch=1,
        context=context,
        num_tokens=args.tokens,
        machine=machine,
        tok_s=Spread.of([len(steps) / sum(steps) for steps in timed]),
        step_ms=Spread.of([1e3 * step for steps in timed for step in steps]),
    )


def generate(model: Any, rng: random.Random, vocab_size: int, num_prompt: int, num_tokens: int) -> Iterator[int]:
    """The tokens that follow a random prompt, each once it is known."""
    prompt = mx.array([rng.randrange(vocab_size) for _ in range(num_prompt)])
    for token, _ in generate_step(prompt, model, max_tokens=num_tokens):
        yield int(token)


if __name__ == "__main__":
    main()
