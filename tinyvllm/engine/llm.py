"""The offline engine: prompts in, complete outputs out, on the caller's own thread. Names follow vLLM's.

>>> llm = LLM("smollm2-135m-instruct", max_model_len=1024)
>>> [output] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
>>> output.outputs[0].text, output.outputs[0].finish_reason
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tinyvllm.config import EngineConfig, LoRARequest, SamplingParams
from tinyvllm.engine.adapters import require_adapters
from tinyvllm.engine.admission import require_head
from tinyvllm.engine.heap import collect_start
from tinyvllm.engine.loading import Progress as LoadProgress
from tinyvllm.engine.loading import load_engine
from tinyvllm.engine.output import Delta, TokenLogprob
from tinyvllm.errors import RequestError, TinyvllmError
from tinyvllm.profiling import measure
from tinyvllm.scheduling.plan import StepStats
from tinyvllm.scheduling.request import Request
from tinyvllm.text.continuation import render_continued

# text, {"prompt": text} or {"prompt_token_ids": ids}; a mapping may have a "cache_salt"
Prompt = str | Mapping[str, Any]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Logprob:
    """The logprob of a token. `rank` is 1 for the most likely one."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass
class CompletionOutput:
    """One choice: its text and tokens, and why it ended."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None  # of the chosen tokens; None unless logprobs were requested
    logprobs: list[dict[int, Logprob]] | None = None  # per token: the chosen one and the most likely ones
    finish_reason: str | None = None  # stop, length, error
    stop_reason: int | str | None = None
    error: str | None = None  # a message, if finish_reason is "error"

    @classmethod
    def begin(cls, index: int, params: SamplingParams) -> CompletionOutput:
        """A choice without any output yet."""
        return cls(index) if params.logprobs is None else cls(index, cumulative_logprob=0.0, logprobs=[])

    def append(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason, self.stop_reason, self.error = delta.finish_reason, delta.stop_reason, delta.error
        for token in delta.logprobs:
            assert self.logprobs is not None and self.cumulative_logprob is not None
            self.logprobs.append(_by_id(token))
            self.cumulative_logprob += token.logprob


@dataclass
class RequestOutput:
    """A prompt and its n choices."""

    request_id: str
    prompt: str | None  # None if it was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # one per prompt token, None for the first

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


class LLM:
    """A loaded model for offline use. Bound to the thread that made it, as the device's caches are."""

    def __init__(self, model: str, *, progress: LoadProgress | None = None, **engine_config: Any) -> None:
        """Load and warm up `model`: a catalog name, a directory, a .gguf file or a hub id.

        engine_config: fields of EngineConfig, such as max_model_len=1024. progress(stage, done, total) is called during
        start-up. Raises ModelError, CapacityError or, for an unknown field, TinyvllmError.
        """
        known = [f.name for f in fields(EngineConfig) if f.name != "model"]
        unknown = sorted(set(engine_config) - set(known))
        if unknown:
            raise TinyvllmError(f"LLM has no setting {', '.join(unknown)}: it has {', '.join(known)}")
        self.config = EngineConfig(model, **engine_config)
        self._loaded = load_engine(self.config, progress)
        collect_start(self._loaded.runner.num_captures)
        self._thread_id = threading.get_ident()
        self._numbers = itertools.count()

    @property
    def stats(self) -> StepStats:
        """Counts and seconds of the latest step."""
        return self._loaded.engine.core.stats

    def get_default_sampling_params(self) -> SamplingParams:
        """The settings that the model's own files recommend."""
        defaults = self._loaded.generation_defaults
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "typical_p")
        stated = {name: getattr(defaults, name) for name in names if getattr(defaults, name) is not None}
        return SamplingParams(**stated)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt, batching as many as fit; outputs are in the order of the prompts.

        params: one for all, one per prompt, or None for the model's defaults. use_tqdm: show a progress bar, if stderr
        is a terminal. Prompts with a "cache_salt" share cached prefixes only with those of the same salt. lora_request:
        the adapter of all prompts, or one (or None) per prompt; it is loaded if it is not yet, and stays loaded. Raises
        RequestError (ContextLengthError) before anything is computed if a prompt cannot run.
        """
        batch: Sequence[Prompt] = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        salts = [prompt.get("cache_salt") if isinstance(prompt, Mapping) else None for prompt in batch]
        return self._run([self._tokenize(prompt) for prompt in batch], params, use_tqdm, salts, lora_request)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        continue_final_message: bool = False,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation or several, formatted by the model's chat template.

        continue_final_message: continue the last message instead. template_arguments: `tools`, and variables of the
        template. Raises RequestError for messages that the template refuses.
        """
        template = self._loaded.chat_template
        if template is None:
            raise RequestError("the model has no chat template: set chat_template", param="messages")
        batch: Any = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        render = functools.partial(render_continued, template) if continue_final_message else template.render
        texts = [render(conversation, **template_arguments) for conversation in batch]
        encode = self._loaded.tokenizer.encode_chat
        return self._run([(text, encode(text)) for text in texts], params, use_tqdm, lora_request=lora_request)

    def reset_prefix_cache(self, reset_external: bool = False) -> None:
        """Forget all cached prefixes; with reset_external also the copies in host memory and on disk."""
        self._loaded.core.scheduler.block_manager.reset(with_tiers=reset_external)

    def close(self) -> None:
        """Free the device's memory. The LLM cannot be used afterwards."""
        self._loaded.runner.close()

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt's text, if it has one, and its token ids."""
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            prompt = prompt.get("prompt", prompt)
        if not isinstance(prompt, str):
            raise RequestError(
                f"a prompt is {type(prompt).__name__} {prompt!r:.100}: give a string, {{'prompt': text}} or "
                "{'prompt_token_ids': ids}",
                param="prompt",
            )
        with measure.span(measure.TOKENIZE):
            return prompt, self._loaded.tokenizer.encode(prompt)

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        cache_salts: Sequence[str | None] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for prompts with their tokens. cache_salts: one per prompt; None: none has one."""
        if threading.get_ident() != self._thread_id:
            raise TinyvllmError("an LLM is bound to the thread that created it: use AsyncEngine from several threads")
        require_head(self._loaded.model_config)
        outputs: list[RequestOutput] = []
        requests: list[list[Request]] = []
        salts = cache_salts or [None] * len(prompts)
        adapters = self._adapters_per_prompt(lora_request, len(prompts))
        each = zip(prompts, self._params_per_prompt(params, len(prompts)), salts, adapters, strict=True)
        for (text, prompt_ids), own, salt, adapter in each:
            request_id = str(next(self._numbers))
            grammar = None if own.grammar is None else self._loaded.grammars.compile_now(own.grammar)
            choices = self._loaded.factory.make_requests(
                request_id, prompt_ids, own, grammar=grammar, cache_salt=salt, adapter=adapter
            )
            requests.append(choices)
            blank = [CompletionOutput.begin(index, own) for index in range(own.n)]
            outputs.append(RequestOutput(request_id, text, choices[0].prompt_ids, blank))
        self._generate(requests, outputs, use_tqdm)
        return outputs

    def _adapters_per_prompt(
        self, lora_request: LoRARequest | Sequence[LoRARequest | None] | None, count: int
    ) -> list[str]:
        """The key of each prompt's adapter, which is loaded if it is not yet; "": none."""
        if lora_request is None:
            return [""] * count
        adapters = require_adapters(self._loaded.core.adapters)
        each = [lora_request] * count if isinstance(lora_request, LoRARequest) else list(lora_request)
        if len(each) != count:
            raise RequestError(f"{len(each)} lora_requests for {count} prompts: give one for all, or one per prompt")
        return ["" if one is None else adapters.find(one).key for one in each]

    def _params_per_prompt(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise RequestError(
                f"{len(params)} sampling params for {count} prompts: give one for all, or one per prompt"
            )
        return list(params)

    def _generate(self, requests: list[list[Request]], outputs: list[RequestOutput], use_tqdm: bool) -> None:
        """Run the requests to their end, filling `outputs`. If anything raises, the remaining requests are aborted."""
        engine = self._loaded.engine
        owners = {
            request.request_id: output for choices, output in zip(requests, outputs, strict=True) for request in choices
        }
        try:
            for choices in requests:
                for index, request in enumerate(choices):
                    engine.add(request, index)
            with _progress_bar(len(outputs), use_tqdm) as advance:
                while engine.has_work:
                    for request, delta in engine.step():
                        output = owners[request.request_id]
                        output.outputs[delta.index].append(delta)
                        if delta.prompt_logprobs is not None:
                            scores = delta.prompt_logprobs
                            output.prompt_logprobs = [None if token is None else _by_id(token) for token in scores]
                        output.num_cached_tokens = max(output.num_cached_tokens, delta.num_cached_tokens)
                        if output.finished:
                            advance()
        finally:
            for request_id in owners:
                engine.abort(request_id)


def _by_id(token: TokenLogprob) -> dict[int, Logprob]:
    """The chosen token and the most likely ones by id, the chosen one first."""
    return {each.token_id: Logprob(each.logprob, each.rank, each.token) for each in (token, *token.top)}


@contextmanager
def _progress_bar(num_prompts: int, is_wanted: bool) -> Iterator[Any]:
    """Yield a function to call after each finished prompt. Draws on a terminal only."""
    console = Console(stderr=True)
    if not is_wanted or not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("Generating"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("Generating", total=num_prompts)
        yield lambda: bar.advance(task)
