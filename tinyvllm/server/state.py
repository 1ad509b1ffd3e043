"""The state that an app's handlers share, and their only way to the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from tinyvllm.config import MAX_LOGPROBS, SamplingParams
from tinyvllm.engine.beam import generate_beams
from tinyvllm.errors import DeviceError, EngineDeadError
from tinyvllm.profiling import measure
from tinyvllm.server.context import RequestContext, current
from tinyvllm.server.failures import NotReadyError
from tinyvllm.server.front_ends import FrontEnds
from tinyvllm.server.generation import BeamCall, Generation, Job, OpenCall, PromptCall, Sink
from tinyvllm.server.metrics import Metrics, PromptObserver
from tinyvllm.server.request_limits import Admission, Drain, DrainingError, timed_out
from tinyvllm.server.request_log import RequestLog
from tinyvllm.server.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from tinyvllm.engine.async_engine import AdapterInfo, AsyncEngine
    from tinyvllm.engine.output import Delta
    from tinyvllm.server.settings import ServerSettings

log = logging.getLogger(__name__)

MAX_LOGGED_CHARS = 2000  # of a prompt, with --log-requests


class ServerState:
    """Owns the limits, counts and history around one engine. Used only on the server's event loop."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings, front_ends: FrontEnds | None = None) -> None:
        self.engine = engine
        self.settings = settings
        self.front_ends = front_ends or FrontEnds()
        self.board = self.front_ends.board
        self.admission = Admission(settings, self.board)
        self.drain = Drain(self.board)
        self.metrics = Metrics(engine, self.front_ends)
        self.requests = RequestLog()
        self.start_s = time.monotonic()
        self.watchdog = Watchdog(engine, settings.watchdog_timeout_s)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The served model's names. Answers have the first."""
        return (self.engine.served_model_name, *self.settings.model_aliases)

    def find_adapter(self, name: str) -> AdapterInfo | None:
        """The loaded adapter of this name; else the one that the name with Ollama's tag stands for."""
        known = {info.name: info for info in self.engine.adapters()}
        return known.get(name) or known.get(name.removesuffix(":latest"))

    @property
    def all_names(self) -> tuple[str, ...]:
        """What requests may give as `model`: the model's names and its adapters'."""
        return (*self.model_names, *[info.name for info in self.engine.adapters()])

    @property
    def context_limit(self) -> int:
        """The most tokens of prompt and output together. The pool may hold fewer than the model's context."""
        return min(self.engine.capacity.max_model_len, self.engine.capacity.num_tokens)

    def require_engine(self) -> None:
        """Raise EngineDeadError or NotReadyError unless the engine can take requests."""
        if self.engine.error is not None:
            raise EngineDeadError(f"the engine has stopped: {self.engine.error}. Restart the server")
        if not self.engine.is_ready:
            raise NotReadyError("the model is still loading or warming up, or the server is stopping: try again later")

    def require_ready(self) -> None:
        """Raise the error that keeps the server from taking another request. Called before the prompt is read."""
        self.require_engine()
        if self.drain.has_begun:
            raise DrainingError("the server is stopping and takes no new requests: use another, or try again later")
        self.admission.check_room(self._max_num_seqs)

    @property
    def _max_num_seqs(self) -> int:
        """Sequences that can run at once, on all engines."""
        return self.engine.capacity.max_num_seqs * self.engine.num_engines

    def _admit(self, num_seqs: int, num_tokens: int) -> RequestContext:
        """Admit the sequences of one prompt, for the request that is being handled. Raises if they are refused."""
        context = current()
        self.admission.admit(context, num_seqs, num_tokens, self._max_num_seqs)
        return context

    async def generate(self, job: Job, sink: Sink) -> Generation:
        """Start to generate from each prompt of a request, with the server's admission, deadline, metrics and log line.

        Raises if a prompt is not admitted, or is refused by the engine at once; later refusals reach `sink`. What the
        request holds of the queue is released when it ends, and its calls are closed then, if not before.
        """
        context = current()
        context.times.begin(job.arrival_s)
        context.times.call_ids += [prompt.request_id for prompt in job.prompts]
        for prompt in job.prompts:
            self._admit(prompt.params.n, len(prompt.ids))
        generation = Generation(sink, job.n, sum(prompt.params.n for prompt in job.prompts))
        context.closers.append(generation.close)
        timeout_s, deadline_s = self.settings.request_timeout_s, None
        if timeout_s is not None:
            spent_s = time.perf_counter() - job.arrival_s
            deadline_s = asyncio.get_running_loop().time() + timeout_s - spent_s
        try:
            async with asyncio.timeout_at(deadline_s):
                for position in range(len(job.prompts)):
                    await self._start(generation, job, position, context)
        except TimeoutError as error:
            generation.close()
            raise timed_out(timeout_s or 0.0) from error
        except BaseException:
            generation.close()
            raise
        generation.end_at(deadline_s, timeout_s)
        return generation

    async def _start(self, generation: Generation, job: Job, position: int, context: RequestContext) -> None:
        """Start the call of one prompt."""
        prompt = job.prompts[position]
        ids, params = prompt.ids, self._clamped(prompt)
        if self.settings.log_requests:
            self._log_request(ids, params, prompt.request_id)
        observer = PromptObserver(
            self.metrics,
            params,
            generation.receiver(position),
            arrival_s=job.arrival_s,
            on_first=lambda: self.admission.prompt_computed(context, len(ids)),
            times=context.times,
        )
        options: Any = {"request_id": prompt.request_id, "priority": job.priority, "cache_salt": job.cache_salt}
        options |= _adapter_of(context)
        call: OpenCall
        try:
            if job.beams is None:
                call = await self.engine.submit(ids, params, observer, **options)
                if measure.is_on():
                    _measure_call(job, prompt.request_id, context.request_id)
            else:
                call = BeamCall(generate_beams(self.engine, ids, params, job.beams, **options), observer)
        except asyncio.CancelledError:  # the client left, or the time was up
            observer.abandon()
            raise
        generation.add(call, observer)

    def _clamped(self, prompt: PromptCall) -> SamplingParams:
        """The prompt's parameters; with --clamp-max-tokens, those that fit into the context."""
        params, room = prompt.params, self.context_limit - len(prompt.ids)
        if not self.settings.clamp_max_tokens or params.max_tokens is None or params.max_tokens <= room:
            return params
        return dataclasses.replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))

    async def embed(
        self, ids: list[int], pooling: str, *, request_id: str, arrival_s: float, priority: int = 0
    ) -> NDArray[np.float32]:
        """(hidden_size,): the engine's embedding of one text, subject to admission and the deadline."""
        context = self._begin(len(ids), request_id, arrival_s)
        timeout_s = self.settings.request_timeout_s
        remaining_s = None if timeout_s is None else timeout_s - (time.perf_counter() - arrival_s)
        try:
            async with asyncio.timeout(remaining_s):
                options: Any = {"request_id": request_id, "priority": priority} | _adapter_of(context)
                embedding = await self.engine.embed(ids, pooling, **options)
        except TimeoutError as error:
            raise timed_out(timeout_s or 0.0) from error
        self._note_result(context, len(ids))
        return embedding

    async def logprobs_of(
        self, ids: list[int], token_ids: Sequence[int], *, request_id: str, arrival_s: float, priority: int = 0
    ) -> list[float]:
        """The model's logprob of each of `token_ids` as the next token of the prompt, subject to admission and the
        deadline. Each is the sampled one, or among the likeliest; otherwise it is asked for by itself."""
        context, found = self._begin(len(ids), request_id, arrival_s), dict[int, float]()
        timeout_s = self.settings.request_timeout_s
        remaining_s = None if timeout_s is None else timeout_s - (time.perf_counter() - arrival_s)
        try:
            async with asyncio.timeout(remaining_s):
                while missing := tuple(token_id for token_id in token_ids if token_id not in found):
                    params = SamplingParams(
                        temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=MAX_LOGPROBS, allowed_token_ids=missing
                    )
                    options: Any = {"priority": priority} | _adapter_of(context)
                    call = self.engine.generate(ids, params, request_id=f"{request_id}-{len(found)}", **options)
                    (sampled,) = [token async for delta in call for token in _checked(delta).logprobs]
                    found |= {token.token_id: token.logprob for token in (*sampled.top, sampled)}
        except TimeoutError as error:
            raise timed_out(timeout_s or 0.0) from error
        self._note_result(context, len(ids))
        return [found[token_id] for token_id in token_ids]

    def _begin(self, num_tokens: int, request_id: str, arrival_s: float) -> RequestContext:
        """Admit a text that is computed, but not continued."""
        context = self._admit(1, num_tokens)
        context.times.begin(arrival_s)
        context.times.call_ids.append(request_id)
        return context

    def _note_result(self, context: RequestContext, num_tokens: int) -> None:
        """The engine has computed a text."""
        self.admission.prompt_computed(context, num_tokens)
        context.times.result_s = time.perf_counter()
        context.times.num_prompt_tokens += num_tokens

    def _log_request(self, ids: list[int], params: SamplingParams, request_id: str) -> None:
        text = self.engine.tokenizer.decode(ids[:MAX_LOGGED_CHARS], skip_special_tokens=False)
        shown = ascii(text if len(text) <= MAX_LOGGED_CHARS else text[:MAX_LOGGED_CHARS] + "...")
        log.info("received request %s: %d tokens, prompt: %s, params: %s", request_id, len(ids), shown, params)


def _adapter_of(context: RequestContext) -> dict[str, str]:
    """The engine's option for a request's adapter, if it has one."""
    return {} if context.adapter is None else {"adapter": context.adapter.key}


def _measure_call(job: Job, request_id: str, http_id: str) -> None:
    """Record a call of the engine, from the parsed body on."""
    start_ns, now_ns = int(job.arrival_s * 1e9), time.perf_counter_ns()
    measure.add(measure.CALL, start_ns, now_ns, http=http_id, request=request_id, choices=job.num_choices)


def _checked(delta: Delta) -> Delta:
    """Raise DeviceError for the end of a call that failed."""
    if delta.finish_reason not in (None, "stop", "length"):
        raise DeviceError(f"the prompt could not be computed: {delta.error or delta.finish_reason}")
    return delta


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
