"""`tinyvllm generate`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from rich.rule import Rule
from rich.text import Text
from typer import Option

from tinyvllm.cli.answer import Answer, Question, ask, chat_question, raw_question
from tinyvllm.cli.answer_view import make_view, write
from tinyvllm.cli.engine import ready_engine
from tinyvllm.cli.flags import Model, SamplingFlags, TerminalEngineFlags
from tinyvllm.cli.models import require_model
from tinyvllm.cli.record_flags import RecordFlags
from tinyvllm.cli.terminal import err, out, read_stdin, without_echo
from tinyvllm.config import EngineConfig, GenerationDefaults, SamplingParams
from tinyvllm.errors import TinyvllmError
from tinyvllm.storage.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from tinyvllm.cli.answer_view import AnswerView
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.engine.output import TokenLogprob

MAX_SEQS = 16  # per step, even with more prompts: each batch size is another graph to capture
# One graph computes every prompt of the process. For short prompts it gets few rows, because 256 rows of an 8B model
# take 20 s on a CPU. In characters, because the tokenizer is not loaded yet; a prompt may have more tokens than rows.
SHORT_PROMPT_CHARS, SHORT_PROMPT_ROWS = 160, 64


@dataclasses.dataclass(frozen=True)
class Task:
    """What to do with the prompts."""

    prompts: Sequence[str]
    system: str | None
    raw: bool  # continue the prompts instead of answering them
    thinks: bool
    plain: bool
    as_json: bool


def generate(
    *,
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[
        list[str] | None,
        Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="The question; -, or no prompt when stdin is a pipe, reads stdin. Repeatable.",
        ),
    ] = None,
    system: Annotated[
        str | None, Option(metavar="TEXT", help="The system message. [default: from the chat template]")
    ] = None,
    raw: Annotated[
        bool,
        Option(
            "--raw",
            help="Continue the prompt as it is, without the model's chat template: for base models, and for prompts "
            "in the template's format already.",
        ),
    ] = False,
    no_think: Annotated[
        bool, Option("--no-think", help="Ask a reasoning model to answer without reasoning, if its template can.")
    ] = False,
    n: Annotated[int, Option("--n", metavar="COUNT", help="Completions per prompt.")] = 1,
    logprobs: Annotated[
        int | None,
        Option(metavar="COUNT", help="With --json: the log probability of each token and of this many alternatives."),
    ] = None,
    plain: Annotated[bool, Option("--plain", help="Print the text as it is, without rendering Markdown.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON document at the end.")] = False,
    sampling: SamplingFlags,
    record: RecordFlags,
    engine: TerminalEngineFlags,
) -> None:
    """Answer a prompt, in this process: no server is needed.

    stdout has the answer alone. Markdown is rendered on a terminal, and a model's reasoning shown there only."""
    engine.apply()
    if raw and system is not None:
        raise TinyvllmError("--system needs the chat template, which --raw leaves out: put it into the prompt")
    task = Task(_read_prompts(prompt or [], model, raw=raw), system, raw, not no_think, plain, as_json)
    config = _fit_to(task, engine.make_config(model, num_seqs=_num_seqs(task, n), warm_up="idle"))
    more = {"n": n, "logprobs": logprobs}
    sampling.make_params(GenerationDefaults(), **more)  # raises for a bad value before the model is loaded
    require_model(model, pull=engine.pull)
    with without_echo():
        asyncio.run(_generate(config, task, sampling, more, record))


def _read_prompts(given: Sequence[str], model: str, *, raw: bool) -> list[str]:
    """The prompts, with stdin in place of -. Raises TinyvllmError if there are none; `model` may be a misplaced one."""
    if not given and not sys.stdin.isatty():
        given = ["-"]
    piped = ""
    if "-" in given:
        piped = read_stdin()
        if not raw:
            piped = piped.removesuffix("\n")  # which `echo` adds
    prompts = [piped if text == "-" else text for text in given]
    if not any(prompts):
        taken = f" ({model!r} was taken for a MODEL)" if " " in model else ""
        empty = ", and stdin is empty" if "-" in given else ""
        raise TinyvllmError(f"no prompt given{empty}: use --prompt TEXT, or pipe a text in{taken}")
    return prompts


def _num_seqs(task: Task, n: int) -> int:
    return max(1, min(len(task.prompts) * n, MAX_SEQS))


def _fit_to(task: Task, config: EngineConfig) -> EngineConfig:
    """The settings with few rows per step if the prompts are short and no flag says otherwise."""
    num_chars = sum(map(len, task.prompts)) + len(task.system or "")
    is_free = config.max_num_batched_tokens is None and (config.max_num_seqs or 1) <= MAX_SEQS
    if config.warm_up != "idle" or not is_free or num_chars > SHORT_PROMPT_CHARS:
        return config
    return dataclasses.replace(config, max_num_batched_tokens=SHORT_PROMPT_ROWS)


async def _generate(
    config: EngineConfig, task: Task, sampling: SamplingFlags, more: dict[str, Any], record: RecordFlags
) -> None:
    begun_s = time.monotonic()
    streams = len(task.prompts) == 1 and more["n"] == 1 and not task.as_json
    # before the engine is ready, because it takes time
    view = make_view(plain=task.plain or task.raw, shows_reasoning=False) if streams else None
    engine = await ready_engine(config, uses_adapter=bool(config.lora_modules))
    start_s = time.monotonic() - begun_s
    with record.recording():
        try:
            params = sampling.make_params(engine.generation_defaults, **more)
            questions = _questions(engine, task, params)
            results = await _answer_all(engine, questions, view)
            if view is not None:
                view.close()
        except BaseException:  # Ctrl-C too: what was begun on the terminal is ended
            if view is not None:
                view.abandon()
            raise
        finally:
            await engine.shutdown()
    if view is not None:
        _warn_of_full_context(results[0][0], params)
    elif task.as_json:
        document = _document(engine.served_model_name, task, questions, results, start_s)
        print(json.dumps(document))  # not through rich, which would wrap the line, and color it on a terminal
    else:
        _print_results(results)


def _questions(engine: AsyncEngine, task: Task, params: SamplingParams) -> list[Question]:
    """Raises TinyvllmError for a system message without a template, and RequestError if the template refuses."""
    if engine.chat_template is None and not task.raw:
        if task.system is not None:
            raise TinyvllmError("this model has no chat template for --system: give one with --chat-template FILE")
        err.print(Text("note: this model has no chat template, so the prompt is continued as with --raw", style="dim"))
    if task.raw or engine.chat_template is None:
        return [raw_question(engine, prompt, params) for prompt in task.prompts]
    system = [] if task.system is None else [{"role": "system", "content": task.system}]
    return [
        chat_question(engine, [*system, {"role": "user", "content": prompt}], params, thinks=task.thinks)
        for prompt in task.prompts
    ]


async def _answer_all(
    engine: AsyncEngine, questions: Sequence[Question], view: AnswerView | None
) -> list[list[Answer]]:
    """The answers to each question. Raises TinyvllmError if the engine could not finish one."""
    results = [[Answer() for _ in range(question.params.n)] for question in questions]
    await asyncio.gather(
        *(
            ask(engine, question, answers, view, request_id=f"prompt-{position}")
            for position, (question, answers) in enumerate(zip(questions, results, strict=True))
        )
    )
    return results


def _warn_of_full_context(answer: Answer, params: SamplingParams) -> None:
    if answer.finish_reason == "length" and len(answer.token_ids) != params.max_tokens:
        num_tokens = answer.num_prompt_tokens + len(answer.token_ids)
        note = f"note: the answer is cut, because the context of {num_tokens} tokens is full: see --max-model-len"
        err.print(Text(note, style="dim"))


def _print_results(results: Sequence[Sequence[Answer]]) -> None:
    for position, answers in enumerate(results):
        for index, answer in enumerate(answers):
            title = f"prompt {position + 1}" + (f", answer {index + 1}" if len(answers) > 1 else "")
            out.print(Rule(f"{title} ({answer.finish_reason})", align="left"))
            write(answer.text + "\n")


def _document(
    model: str, task: Task, questions: Sequence[Question], results: Sequence[Sequence[Answer]], start_s: float
) -> dict[str, Any]:
    num_prompt = sum(len(question.ids) for question in questions)
    num_output = sum(len(answer.token_ids) for answers in results for answer in answers)
    return {
        "model": model,
        "outputs": [
            {
                "prompt": prompt,
                "prompt_token_ids": question.ids,
                "num_cached_tokens": max(answer.num_cached_tokens for answer in answers),
                "outputs": [_as_json(index, answer) for index, answer in enumerate(answers)],
            }
            for prompt, question, answers in zip(task.prompts, questions, results, strict=True)
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        },
        "timings": {"start_s": round(start_s, 3)},
    }


def _as_json(index: int, answer: Answer) -> dict[str, Any]:
    return {
        "index": index,
        "text": answer.text,
        "reasoning_content": answer.reasoning or None,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "logprobs": [_logprob_as_json(entry) for entry in answer.logprobs] or None,
        "timings": {
            "first_token_s": _rounded(answer.first_token_s),
            "tokens_per_s": _rounded(answer.tokens_per_s),
            **answer.draft_counts,
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _logprob_as_json(entry: TokenLogprob) -> dict[str, Any]:
    top = [{"token_id": other.token_id, "token": other.token, "logprob": other.logprob} for other in entry.top]
    return {"token_id": entry.token_id, "token": entry.token, "logprob": entry.logprob, "top": top}
