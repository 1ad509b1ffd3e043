"""`tinyvllm generate`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

from rich.rule import Rule
from typer import Option

from tinyvllm.cli.engine import ready_engine
from tinyvllm.cli.flags import EngineFlags, Model, SamplingFlags
from tinyvllm.cli.models import require_model
from tinyvllm.cli.record_flags import RecordFlags
from tinyvllm.cli.terminal import out
from tinyvllm.config import EngineConfig, GenerationDefaults, SamplingParams
from tinyvllm.errors import TinyvllmError
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.engine.output import Delta, TokenLogprob

MAX_SEQS = 16  # per step, even with more prompts: each batch size is another graph to capture


def generate(
    *,
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[
        list[str] | None,
        Option("--prompt", "-p", metavar="TEXT", help="The text to continue; - reads stdin. Repeatable."),
    ] = None,
    n: Annotated[int, Option("--n", metavar="COUNT", help="Completions per prompt.")] = 1,
    logprobs: Annotated[
        int | None,
        Option(metavar="COUNT", help="With --json: the log probability of each token and of this many alternatives."),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON document at the end.")] = False,
    sampling: SamplingFlags,
    record: RecordFlags,
    engine: EngineFlags,
) -> None:
    """Generate text from prompts. No server is needed."""
    engine.apply()
    if not prompt:
        raise TinyvllmError("no prompt given: use --prompt TEXT, or --prompt - to read stdin")
    prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
    config = engine.make_config(model, num_seqs=max(1, min(len(prompts) * n, MAX_SEQS)))
    require_model(model, pull=engine.pull)
    more = {"n": n, "logprobs": logprobs}
    sampling.make_params(GenerationDefaults(), **more)  # raises for a bad value before the model is loaded
    asyncio.run(_generate(config, prompts, sampling, more, record, as_json=as_json))


async def _generate(
    config: EngineConfig,
    prompts: list[str],
    sampling: SamplingFlags,
    more: dict[str, Any],
    record: RecordFlags,
    *,
    as_json: bool,
) -> None:
    engine = await ready_engine(config)
    with record.recording():
        try:
            params = sampling.make_params(engine.generation_defaults, **more)
            streams = len(prompts) == 1 and params.n == 1 and not as_json
            results = await asyncio.gather(
                *(
                    _run(engine, prompt, params, request_id=f"prompt-{position}", streams=streams)
                    for position, prompt in enumerate(prompts)
                )
            )
        finally:
            await engine.shutdown()
        if as_json:
            # not through rich, which would wrap the line, and color it on a terminal
            print(json.dumps({"model": engine.served_model_name, "outputs": [_as_json(result) for result in results]}))
        elif streams:
            out.print()
        else:
            _print_results(results)


@dataclasses.dataclass
class _Result:
    prompt: str
    prompt_ids: list[int]
    num_cached_tokens: int
    choices: list[_Choice]


@dataclasses.dataclass
class _Choice:
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


async def _run(engine: AsyncEngine, prompt: str, params: SamplingParams, *, request_id: str, streams: bool) -> _Result:
    """Generate all completions of one prompt. Raises TinyvllmError if the engine could not finish it."""
    ids = engine.tokenizer.encode(prompt)
    result = _Result(prompt, ids, 0, [_Choice() for _ in range(params.n)])
    async with contextlib.aclosing(engine.generate(ids, params, request_id=request_id)) as deltas:
        async for delta in deltas:
            if delta.finish_reason in ("error", "abort"):
                raise TinyvllmError(f"generation failed: {delta.error or 'the request was aborted'}")
            result.choices[delta.index].add(delta)
            result.num_cached_tokens = delta.num_cached_tokens
            if streams:
                write(delta.text)
    return result


def write(text: str) -> None:
    """Write a piece of an answer to stdout verbatim, without buffering."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_results(results: list[_Result]) -> None:
    for position, result in enumerate(results):
        for index, choice in enumerate(result.choices):
            title = f"prompt {position + 1}" + (f", answer {index + 1}" if len(result.choices) > 1 else "")
            out.print(Rule(f"{title} ({choice.finish_reason})", align="left"))
            write(choice.text + "\n")


def _as_json(result: _Result) -> dict[str, Any]:
    return {
        "prompt": result.prompt,
        "prompt_token_ids": result.prompt_ids,
        "num_cached_tokens": result.num_cached_tokens,
        "outputs": [
            {
                "index": index,
                "text": choice.text,
                "token_ids": choice.token_ids,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "logprobs": [_logprob_as_json(entry) for entry in choice.logprobs] or None,
            }
            for index, choice in enumerate(result.choices)
        ],
    }


def _logprob_as_json(entry: TokenLogprob) -> dict[str, Any]:
    top = [{"token_id": other.token_id, "token": other.token, "logprob": other.logprob} for other in entry.top]
    return {"token_id": entry.token_id, "token": entry.token, "logprob": entry.logprob, "top": top}
