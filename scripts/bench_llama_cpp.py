"""Measure a GGUF file with llama.cpp, as rows of `tinyvllm bench latency`, to compare with ours.

    pip install xllamacpp gguf rich        # in a separate environment; xllamacpp includes a prebuilt llama.cpp
    python scripts/bench_llama_cpp.py MODEL.gguf --threads 2 --json llama_cpp.json

Prompts are random ids. Times are llama.cpp's own, of a whole repeat, so single steps have no spread. It counts the
first token, which the prompt's step samples, as generated, but does not include it in the time. So a repeat of N decode
steps requests N + 1 tokens, and its time is divided by N. With several sequences at once only wall-clock time is
available: the time of N + 1 tokens minus that of 1, divided by N.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp
from gguf import GGUFReader, LlamaFileType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tinyvllm need not be installed here

from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.rows import Machine, Row
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.tables import markdown_table


def main() -> None:
    args = parse_arguments()
    machine, vocab_size = describe(args)
    bench = Bench(args, machine, vocab_size)
    rows = [bench.prefill(length) for length in args.prefill]
    rows += [bench.decode(context) for context in args.context]
    if args.parallel > 1:
        rows += [bench.decode_parallel(args.parallel, context) for context in args.context]
    print(markdown_table(rows))
    text = json.dumps([row.as_json() for row in rows])
    if args.json == "-":
        print(text)
    elif args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time decoding and prefill in llama.cpp, as rows of tinyvllm's benchmarks."
    )
    lengths: dict[str, Any] = {
        "type": lambda text: [int(part) for part in text.split(",") if part],
        "metavar": "LENGTHS",
    }
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--threads", type=int, default=2, metavar="COUNT")
    parser.add_argument("--prefill", default=[512], help="prompt lengths, such as 128,512", **lengths)
    parser.add_argument("--context", default=[128, 1024], help="tokens before the first decode step", **lengths)
    parser.add_argument(
        "--parallel", type=int, default=16, metavar="COUNT", help="sequences at once; 1: skip these rows"
    )
    parser.add_argument("--tokens", type=int, default=32, metavar="COUNT", help="decode steps per repeat")
    parser.add_argument("--repeats", type=int, default=5, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=0, metavar="INTEGER")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON; -: as the last line of stdout")
    return parser.parse_args()


def describe(args: argparse.Namespace) -> tuple[Machine, int]:
    """The facts that all rows share, and the size of the vocabulary."""
    reader = GGUFReader(args.model)
    file_type = reader.get_field("general.file_type")
    machine = Machine(
        model=f"{args.model.stem} (llama.cpp)",
        dtype="" if file_type is None else LlamaFileType(file_type.contents()).name.removeprefix("MOSTLY_"),
        num_params=sum(int(tensor.n_elements) for tensor in reader.tensors),
        model_bytes=sum(int(tensor.n_bytes) for tensor in reader.tensors),
        device=f"CPU, {args.threads} threads",
        bandwidth_gbps=None,
        environment=describe_environment(args.seed, library="xllamacpp"),
    )
    (embedding,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    return machine, int(embedding.shape[1])  # ggml lists columns first


class Bench:
    """Runs each case on a server with as many slots as it needs, after one untimed repeat."""

    def __init__(self, args: argparse.Namespace, machine: Machine, vocab_size: int) -> None:
        self.args = args
        self.machine = machine
        self.random = random.Random(args.seed)
        self.vocab_size = vocab_size

    def prefill(self, length: int) -> Row:
        server = self.start(1, length + 2)
        seconds = [self.complete(server, length, 1)["prompt_ms"] / 1e3 for _ in range(1 + self.args.repeats)][1:]
        return self.row("prefill", 1, 0, length, f"pp{length}", seconds, num_steps=1)

    def decode(self, context: int) -> Row:
        steps = self.args.tokens
        server = self.start(1, context + steps + 2)
        answers = [self.complete(server, context, steps + 1) for _ in range(1 + self.args.repeats)][1:]
        seconds = [timings["predicted_ms"] / 1e3 for timings in answers]
        return self.row("decode", 1, context, steps, f"tg{steps} @ d{context}", seconds, num_steps=steps)

    def decode_parallel(self, batch: int, context: int) -> Row:
        steps = self.args.tokens
        server = self.start(batch, context + steps + 2)
        seconds = []
        for _ in range(1 + self.args.repeats):
            prompt_s, whole_s = (self.time_parallel(server, batch, context, count) for count in (1, steps + 1))
            seconds.append(whole_s - prompt_s)
        test = f"tg{steps} @ d{context}, batch {batch}"
        return self.row("decode", batch, context, steps, test, seconds[1:], num_steps=steps)

    def start(self, num_slots: int, max_tokens: int) -> Any:
        params = xllamacpp.CommonParams()
        params.model.path = str(self.args.model)
        params.n_parallel = num_slots
        params.n_ctx = num_slots * -(-max_tokens // 256) * 256  # divided among the slots
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.args.threads
        params.cache_ram_mib = 0
        params.verbosity = 0
        return xllamacpp.Server(params)

    def complete(self, server: Any, num_prompt: int, num_predicted: int) -> dict[str, Any]:
        """Generate from a random prompt. Returns llama.cpp's timings."""
        answer = server.handle_completions(
            {
                "prompt": [self.random.randrange(self.vocab_size) for _ in range(num_prompt)],
                "n_predict": num_predicted,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings: dict[str, Any] = answer["timings"]
        if (timings["prompt_n"], timings["predicted_n"]) != (num_prompt, num_predicted):
            raise SystemExit(f"asked for {num_prompt} + {num_predicted} tokens, but llama.cpp computed {timings}")
        return timings

    def time_parallel(self, server: Any, batch: int, num_prompt: int, num_predicted: int) -> float:
        with ThreadPoolExecutor(batch) as pool:
            start_s = time.perf_counter()
            list(pool.map(lambda _: self.complete(server, num_prompt, num_predicted), range(batch)))
            return time.perf_counter() - start_s

    def row(
        self, phase: str, batch: int, context: int, num_tokens: int, test: str, seconds: list[float], *, num_steps: int
    ) -> Row:
        return Row(
            test=test,
            phase=phase,
            batch=batch,
            context=context,
            num_tokens=num_tokens,
            machine=self.machine,
            tok_s=Spread.of([batch * num_tokens / value for value in seconds]),
            step_ms=Spread.of([value / num_steps * 1e3 for value in seconds]),
        )


if __name__ == "__main__":
    main()
