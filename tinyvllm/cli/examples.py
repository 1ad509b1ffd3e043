"""What --help shows besides flags: examples for each command (tests/cli/test_examples.py parses them all), and the
commands' summaries."""

from __future__ import annotations

import inspect
from collections.abc import Callable

EXAMPLES = {
    "serve": (
        ("tinyvllm serve", "the default model, on http://127.0.0.1:8000"),
        ("tinyvllm serve gemma-3-270m --port 8001 --max-model-len 4096", ""),
        ("tinyvllm serve smollm2-135m-instruct gemma-3-270m --max-loaded 1", "several, loaded when asked for"),
        ("tinyvllm serve --host 0.0.0.0 --api-key-file keys.txt", "for other machines, which need a key"),
    ),
    "generate": (
        ('tinyvllm generate --prompt "Why is the sky blue?"', ""),
        ("tinyvllm generate --system 'Sum it up in one sentence.' < notes.txt", ""),
        ('tinyvllm generate gemma-3-270m --raw -p "The sky is" --max-tokens 20', "a base model"),
    ),
    "chat": (
        ("tinyvllm chat", "the default model"),
        ('tinyvllm chat --system "Answer in French." --stats', ""),
    ),
    "run_batch": (
        ("tinyvllm run-batch smollm2-135m-instruct -i requests.jsonl -o answers.jsonl", ""),
        ("tinyvllm run-batch -i - < requests.jsonl", "the default model; answers on stdout"),
    ),
    "pull": (
        ("tinyvllm pull", "the default model"),
        ("tinyvllm pull HuggingFaceTB/SmolLM2-360M-Instruct", "any model of the Hugging Face hub"),
    ),
    "models": (
        ("tinyvllm models", "the catalog, and what is here"),
        ("tinyvllm models --check smollm2-135m-instruct --device-memory 8GiB", ""),
    ),
    "quantize": (
        ("tinyvllm quantize smollm2-135m-instruct --to q8_0 --out small.gguf", ""),
        ("tinyvllm quantize ./model --to mlx-4 --out model-4bit", ""),
    ),
    "profile": (
        ("tinyvllm profile", "a decode step of the default model"),
        ("tinyvllm profile --prefill 256 --by layer", ""),
        ("tinyvllm profile --unfused", "what fusing gains"),
        ("tinyvllm profile --from trace.txt --last-steps 4", "the output of DEBUG=2"),
    ),
    "tune": (
        ("tinyvllm tune", "the default model; once, then serve it with the same flags"),
        ("tinyvllm tune smollm2-135m-instruct --budget 5", "at most five minutes"),
    ),
    "doctor": (
        ("tinyvllm doctor", ""),
        ("tinyvllm doctor --json report.json", "for a bug report"),
    ),
    "why": (
        ("tinyvllm why", "the latest requests of the server on port 8000"),
        ("tinyvllm why --slowest 5", ""),
        ("tinyvllm why cmpl-0f3a --url http://127.0.0.1:8001", "one request"),
    ),
}


def epilog(command: str) -> str | None:
    """The examples as click prints them: \\b keeps the line breaks. None: the command has none."""
    if command not in EXAMPLES:
        return None
    lines = ["\b", "Examples:"]
    for line, comment in EXAMPLES[command]:
        lines.append(f"  {line}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines)


def summary(command: Callable[..., object]) -> str:
    """The first sentence of a command's help, for the list of commands, where typer would cut it off."""
    paragraph = " ".join((inspect.getdoc(command) or "").split("\n\n")[0].split())
    sentence, dot, _ = paragraph.partition(". ")
    return sentence + dot.rstrip()
