"""How many tokens of its prompts a server recomputes in a conversation of ten turns with a model that has recurrent
layers: measured through the OpenAI-compatible API of any server, from `usage.prompt_tokens_details.cached_tokens`.

    python scripts/ten_turns.py --write /tmp/turns        # a tiny Qwen3.5, in two formats
    tinyvllm serve /tmp/turns/tiny.gguf --max-num-batched-tokens 128 &     # or llama-server, mlx_lm.server, ...
    python scripts/ten_turns.py --url http://127.0.0.1:8000 --model tiny --name tinyvllm --json tinyvllm.json
    python scripts/ten_turns.py --table tinyvllm.json llama.json mlx.json

Four clients, each with its own system prompt:

    appending   sends back what it received, as a chat without reasoning does
    thinking    leaves out the first half of the last answer, as chat templates drop the reasoning of earlier turns
    branching   appends; after the last turn it goes back to the fifth and asks something else
    sharing     asks ten questions of one turn each after the same system prompt, as an agent's subagents do

A turn has to compute the tokens that are new to the server: the user's, and with `thinking` the shortened answer.
Answers are forced to be printable ASCII, so that their text and their tokens are the same with the byte tokenizer.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SYSTEM_TOKENS, USER_TOKENS, ANSWER_TOKENS = 700, 90, 60
NUM_TURNS, BRANCH = 10, 5
CLIENTS = ("appending", "thinking", "branching", "sharing")
PRINTABLE = range(32, 127)
VOCAB = 263  # of the tiny model: bytes, special tokens


@dataclass(frozen=True)
class Turn:
    """`num_new`: tokens of the prompt that were in no earlier prompt or answer, in this place."""

    client: str
    number: int
    num_prompt: int
    num_new: int
    num_recomputed: int


def write_models(directory: Path) -> None:
    from dataclasses import replace

    from tests.families.recipe import write_gguf, write_hf
    from tests.families.recipes import RECIPES

    recipe = RECIPES["qwen3_5"]
    recipe = replace(recipe, config=dict(recipe.config) | {"max_position_embeddings": 8192})
    directory.mkdir(parents=True, exist_ok=True)
    write_gguf(directory / "tiny.gguf", recipe)
    config = dict(recipe.config) | {"dtype": "float32"}
    wrapper = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": config}
    write_hf(directory / "tiny", recipe, more_config=wrapper)  # mlx-lm knows no text model alone


def complete(url: str, model: str, prompt: str) -> tuple[str, int, int]:
    """(the answer, tokens of the prompt, how many of them were cached)."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0.0,
        "logit_bias": {str(token): -100 for token in range(VOCAB) if token not in PRINTABLE},
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    usage, text = answer["usage"], answer["choices"][0]["text"]
    assert usage["prompt_tokens"] == len(prompt), f"{usage['prompt_tokens']} tokens for {len(prompt)} bytes"
    return text, len(prompt), (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def text_of(seed: str, count: int) -> str:
    """Text that begins with the seed, so that conversations share nothing by accident."""
    words = " ".join(f"{seed} {i * i} thinks of {seed[::-1]} {i * 7 % 97}" for i in range(count))
    return words[:count]


def converse(url: str, model: str, client: str) -> list[Turn]:
    history, turns, seen = text_of(f"You are {client}.", SYSTEM_TOKENS), [], [""]
    prompts = []

    def turn(number: int, prompt: str) -> str:
        num_new = len(prompt) - max(common(prompt, earlier) for earlier in seen)
        answer, num_prompt, num_cached = complete(url, model, prompt)
        turns.append(Turn(client, number, num_prompt, num_new, num_prompt - num_cached))
        seen.append(prompt + answer)
        prompts.append(prompt)
        return answer

    for number in range(1, NUM_TURNS + 1):
        question = text_of(f"\n{number}. user:", USER_TOKENS)
        answer = turn(number, history + question)
        if client == "sharing":
            continue
        history += question
        history += answer[len(answer) // 2 :] if client == "thinking" else answer
    if client == "branching":
        turn(NUM_TURNS + 1, prompts[BRANCH - 1][:-USER_TOKENS] + text_of("\nagain:", USER_TOKENS))
    return turns


def common(a: str, b: str) -> int:
    """Characters at the start that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def table(paths: list[Path]) -> str:
    """A row for each client: tokens of its prompts but the first one's, those that were new, and what servers
    recomputed."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    lines = [["client", "prompt tokens", "new", *(run["name"] for run in runs)], ["---", *["---:"] * (2 + len(runs))]]
    for client in CLIENTS:
        found = [[turn for turn in run["turns"] if turn["client"] == client] for run in runs]
        for name, turns in parts_of(client, found):
            counts = [sum(turn[key] for turn in turns[0]) for key in ("num_prompt", "num_new")]
            counts += [sum(turn["num_recomputed"] for turn in run) for run in turns]
            lines.append([name, *(f"{count:,}" for count in counts)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parts_of(client: str, runs: list[list[Any]]) -> list[tuple[str, list[list[Any]]]]:
    """(name of a row, its turns by server): the branch is a row of its own."""
    parts = [(f"{client}, turns 2 to {NUM_TURNS}", [turns[1:NUM_TURNS] for turns in runs])]
    if client == "branching":
        parts.append((f"{client}, back to turn {BRANCH}", [turns[NUM_TURNS:] for turns in runs]))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description="Prompt tokens that a server recomputes in ten turns.")
    parser.add_argument("--write", type=Path, help="write the tiny model into this directory, and end")
    parser.add_argument("--url", help="of the server, without /v1")
    parser.add_argument("--model", default="default_model", help="the name that the server knows the model by")
    parser.add_argument("--name", default="server", help="in the table")
    parser.add_argument("--json", type=Path, help="where the counts go")
    parser.add_argument("--table", type=Path, nargs="+", help="print these files as a table, and end")
    options = parser.parse_args()
    if options.write:
        return write_models(options.write)
    if options.table:
        return print(table(options.table))
    turns = [turn for client in CLIENTS for turn in converse(options.url, options.model, client)]
    for turn in turns:
        print(turn)
    if options.json:
        options.json.write_text(json.dumps({"name": options.name, "turns": [asdict(turn) for turn in turns]}))


if __name__ == "__main__":
    main()
