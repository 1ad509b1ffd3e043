"""A fake AsyncEngine that generates a given reply, and a server around it on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from starlette.types import ASGIApp

from tests.patience import PATIENCE_S
from tinyvllm.config import (
    BlockGroup,
    Capacity,
    EngineConfig,
    GenerationDefaults,
    SamplingParams,
    SpeculativeConfig,
)
from tinyvllm.engine.adapters import AdapterUse
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.client import Receiver
from tinyvllm.engine.constraints import GrammarCompiler
from tinyvllm.engine.output import Delta, Timing, TokenLogprob
from tinyvllm.engine.step_history import CompletedStep, StepHistory
from tinyvllm.errors import RequestError
from tinyvllm.scheduling.adapter_slots import AdapterInfo
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.plan import StepStats
from tinyvllm.server.app import make_app
from tinyvllm.server.event_loop import http_protocol
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.sockets import bind
from tinyvllm.text.fim import FillInTheMiddle
from tinyvllm.text.tokenizer import check_characters


class ByteTokenizer:
    """One token per byte, and an EOS token."""

    vocab_size = 257
    bos_id = None
    eos_id = 256
    eos_ids = special_ids = frozenset({256})
    strips_leading_space = False
    fim: FillInTheMiddle | None = None

    def token_bytes(self, token_id: int) -> bytes:
        return b"<end>" if token_id == 256 else bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        check_characters(text, "prompt")
        return list(text.encode())

    def encode_chat(self, text: str) -> list[int]:
        check_characters(text, "messages")
        return list(text.encode())

    def encode_middle(self, prefix: str | list[int], suffix: str, *, add_special_tokens: bool = True) -> list[int]:
        if self.fim is None:
            raise RequestError("suffix is not supported: no tokens for filling in the middle", param="suffix")
        return self.fim.arrange(list(prefix.encode()) if isinstance(prefix, str) else prefix, suffix.encode())

    def least_tokens(self, text: str) -> int:
        return len(text)

    def most_chars(self, num_tokens: int) -> int:
        return num_tokens

    def without_middle(self, text: str, num_tokens: int) -> str:
        kept = num_tokens + 4096
        return text if len(text) <= 2 * kept else text[:kept] + text[-kept:]

    def cut(self, ids: list[int], num_tokens: int, *, keeps_end: bool, has_special_tokens: bool = False) -> list[int]:
        return ids[-num_tokens:] if keeps_end else ids[:num_tokens]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


class TagTemplate:
    """Renders each message as a line, <role>content."""

    def __init__(self, source: str = "{{ tools }}") -> None:
        self.source = source  # searched for the marks of model families, not rendered
        self.sources = {"default": source}
        self.kwargs: dict[str, Any] = {}
        self.messages: list[dict[str, Any]] = []
        self.tools: Any = None

    def renders_tools(self) -> bool:
        return "tools" in self.source

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        tool_format: Any = None,
        **kwargs: Any,
    ) -> str:
        self.messages, self.tools, self.kwargs = messages, tools, kwargs
        if kwargs.get("fail"):
            raise RequestError("the template refuses these messages", param="messages")
        lines = [f"<{message['role']}>{message['content']}\n" for message in messages]
        return "".join(lines) + ("<assistant>" if add_generation_prompt else "")


# The same for every choice: 1 s in the queue, 2 s to the first token, 4 s more to the last.
TIMING = Timing(
    submitted_s=9.5, queued_s=10.0, scheduled_s=11.0, first_token_s=13.0, last_token_s=17.0, num_preemptions=1
)


@dataclass
class Call:
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str | None = None

    @property
    def prompt(self) -> str:
        return bytes(self.prompt_ids).decode()


class OpenCall:
    """An open call of a FakeEngine."""

    def __init__(
        self, engine: FakeEngine, request_id: str, deltas: AsyncGenerator[Delta, None], receiver: Receiver
    ) -> None:
        self._engine = engine
        self._request_id = request_id
        self._deltas = deltas
        self._receiver = receiver
        self._is_closed = False
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with contextlib.aclosing(self._deltas):
            try:
                async for delta in self._deltas:
                    if self._is_closed:
                        return
                    self._receiver.take(delta)
            except Exception as error:
                self._receiver.fail(error)  # type: ignore[arg-type]

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._engine.leave(self._request_id)
            if self._task is not asyncio.current_task():
                self._task.cancel()


@dataclass
class FakeEngine:
    """Generates `reply`, one character per delta after one delta without text. Records calls and running requests."""

    reply: str = "Hello, wörld!"
    is_ready: bool = True
    error: BaseException | None = None
    hang_before: bool = False  # a request waits forever before its first delta
    hang_after: int | None = None  # after this many characters, a request waits forever
    fail_after: int | None = None  # after this many characters, the step fails
    first_timing: Timing | None = None  # with the first delta of a choice
    fail_text: str = "the step failed: logits are not finite"  # the reason of that
    abort_after: int | None = None  # after this many characters, the request is aborted
    refuse: Exception | None = None  # raised before the first delta
    crash_after: int | None = None  # after this many characters, the iterator raises an unexpected error
    max_model_len: int = 1000
    num_engines: int = 1
    served_model_name: str = "tiny"
    created: int = 1_700_000_000
    chat_template: TagTemplate | None = field(default_factory=TagTemplate)
    generation_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    calls: list[Call] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    closed: list[str] = field(default_factory=list)  # requests that were closed before they ended
    has_shut_down: bool = False
    resets: list[bool] = field(default_factory=list)  # of the prefix cache: whether the tiers' too
    loaded_adapters: list[AdapterInfo] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = ByteTokenizer()
        self.model_config = SimpleNamespace(
            vocab_size=257, name="tiny-model", hidden_size=4, pooling=None, num_labels=0, has_head=True
        )
        self.grammars = GrammarCompiler(self.tokenizer, 257, self.tokenizer.eos_ids)  # type: ignore[arg-type]
        self.capacity = Capacity(
            num_blocks=101, block_size=16, max_model_len=self.max_model_len, max_num_seqs=4, max_num_batched_tokens=64
        )
        self.statistics = StepStats(num_running=2, num_waiting=1, num_free_blocks=50, prefix_queries=40, prefix_hits=30)
        self.statistics.num_preemptions, self.statistics.num_captures = 3, 7
        self.statistics.num_captures_to_come, self.statistics.num_failed_captures = 2, 1
        self.statistics.num_general_operations = 5
        self.config = EngineConfig(
            "tiny", speculative_config=SpeculativeConfig(num_speculative_tokens=3), enable_lora=True
        )
        self.history = StepHistory()
        self.inner = SimpleNamespace(
            core=SimpleNamespace(scheduler=SimpleNamespace(block_manager=BlockManager([BlockGroup(101)], 16)))
        )
        self.changed = threading.Condition()

    def stats(self) -> StepStats:
        return self.statistics

    async def wait_ready(self) -> None:
        if self.error is not None:
            raise self.error

    def adapters(self) -> list[AdapterInfo]:
        return self.loaded_adapters

    async def adapter_uses(self) -> list[list[AdapterUse]]:
        return [[AdapterUse(info) for info in self.loaded_adapters]]

    def engine_stats(self) -> list[StepStats]:
        return [self.statistics]

    def complete_step(self, stats: StepStats) -> None:
        """Let a step end that has these stats."""
        self.statistics = stats
        self.history.add(stats)

    async def pool_states(self) -> list[bytes]:
        return [bytes(self.inner.core.scheduler.block_manager.states())]

    async def latest_steps(self) -> list[list[CompletedStep]]:
        return [self.history.latest()]

    async def look_up_prefix(
        self, prompt_ids: list[int], cache_salt: str | None = None, adapter: str = ""
    ) -> list[list[int]]:
        """Two engines, of which the second has all on disk; none has salted prompts."""
        num_tokens = 0 if cache_salt else len(prompt_ids)
        return [[0, 0, num_tokens // 2], [0, num_tokens // 2, num_tokens]]

    async def reset_prefix_cache(self, *, reset_external: bool = False) -> None:
        self.resets.append(reset_external)

    async def shutdown(self) -> None:
        self.has_shut_down = True

    async def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        self.calls.append(Call(request_id, prompt_ids, params, priority, cache_salt))
        if self.refuse is not None:
            raise self.refuse
        if params.grammar is not None:
            await self.grammars.compile(params.grammar)  # for its errors: the reply is not constrained
        self._note(request_id, running=True)
        try:
            if self.hang_before:
                await asyncio.Event().wait()
            reply = self.reply_to(prompt_ids)
            num_cached_tokens = self.count_cached(prompt_ids)
            for position in range(len(reply) + 1):
                for index in range(params.n):
                    await asyncio.sleep(0)
                    delta = self._delta(reply, position, index, prompt_ids, num_cached_tokens, params)
                    if delta.finish_reason is not None and index == params.n - 1:
                        self._note(request_id, running=False)
                    yield delta
                if self.hang_after is not None and position >= self.hang_after:
                    await asyncio.Event().wait()
                if self.crash_after is not None and position >= self.crash_after:
                    raise ZeroDivisionError("a bug")
                if request_id not in self.running:
                    return
        finally:
            self.leave(request_id)

    def leave(self, request_id: str) -> None:
        if request_id in self.running:
            self.closed.append(request_id)
            self._note(request_id, running=False)

    async def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        receiver: Receiver,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> OpenCall:
        """`generate`, driven by a task. Raises what `refuse` says, and a grammar's errors."""
        options: Any = {"request_id": request_id, "priority": priority, "cache_salt": cache_salt}
        deltas = self.generate(prompt_ids, params, **options)
        if self.refuse is not None:
            await anext(deltas)  # raises it
        if params.grammar is not None:
            await self.grammars.compile(params.grammar)
        return OpenCall(self, request_id, deltas, receiver)

    async def embed(
        self, prompt_ids: list[int], pooling: str, *, request_id: str, priority: int = 0
    ) -> NDArray[np.float32]:
        """A vector of the prompt's length, its first and last id, and whether pooling is "mean"."""
        self._note(request_id, running=True)
        try:
            await asyncio.sleep(0)
            if self.refuse is not None:
                raise self.refuse
            if self.hang_before:
                await asyncio.Event().wait()
            return np.array([len(prompt_ids), prompt_ids[0], prompt_ids[-1], pooling == "mean"], np.float32)
        finally:
            self._note(request_id, running=False)

    def _note(self, request_id: str, *, running: bool) -> None:
        with self.changed:
            (self.running.add if running else self.running.discard)(request_id)
            self.changed.notify_all()

    def wait_until(self, condition: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S), f"{self.running=} {self.closed=}"

    def reply_to(self, prompt_ids: list[int]) -> str:
        return self.reply

    def count_cached(self, prompt_ids: list[int]) -> int:
        """How many of the prompt's tokens the engine says it had in its cache."""
        return min(4, len(prompt_ids) - 1)

    def _delta(
        self,
        reply: str,
        position: int,
        index: int,
        prompt_ids: list[int],
        num_cached_tokens: int,
        params: SamplingParams,
    ) -> Delta:
        """The delta at `position`: 0 has no text, p has the p-th character."""
        limit = params.max_tokens or len(reply) + 1
        text, finish, stop_reason, error = reply[:position][-1:], None, None, None
        if position and reply[:position].endswith(params.stop or ("\0",)):
            finish, stop_reason, text = "stop", next(s for s in params.stop if reply[:position].endswith(s)), ""
        elif position >= len(reply):
            finish = "stop"
        elif position >= limit:
            finish = "length"
        if self.fail_after is not None and position >= self.fail_after:
            finish, error = "error", self.fail_text
        if self.abort_after is not None and position >= self.abort_after:
            finish = "abort"
        logprobs = (_logprob(text, params.logprobs),) if params.logprobs is not None and text else ()
        return Delta(
            index=index,
            text=text,
            token_ids=(1,) * bool(position),
            logprobs=logprobs,
            finish_reason=finish,
            stop_reason=stop_reason,
            num_prompt_tokens=len(prompt_ids),
            num_cached_tokens=num_cached_tokens,
            num_output_tokens=position,
            error=error,
            timing=TIMING if finish is not None else None if position else self.first_timing,
            prompt_logprobs=_score(prompt_ids, params.prompt_logprobs) if position == index == 0 else None,
        )


def _score(prompt_ids: list[int], num_top: int | None) -> tuple[TokenLogprob | None, ...] | None:
    """The prompt's logprobs: the n-th token's is -n."""
    if num_top is None:
        return None
    scored = [
        dataclasses.replace(_logprob(chr(token_id), num_top), token_id=token_id, logprob=-float(n), rank=n)
        for n, token_id in enumerate(prompt_ids[1:], 1)
    ]
    return (None, *scored)


def _logprob(text: str, num_top: int) -> TokenLogprob:
    likeliest = [
        TokenLogprob(token_id=n, token=chr(97 + n), bytes=bytes([97 + n]), logprob=-0.5 - n, top=())
        for n in range(num_top)
    ]
    return TokenLogprob(token_id=99, token=text, bytes=text.encode(), logprob=float("-inf"), top=tuple(likeliest))


@contextlib.contextmanager
def serving(
    engine: FakeEngine | AsyncEngine, http: type[asyncio.Protocol] | None = None, **settings: Any
) -> Iterator[str]:
    """The URL of a server around `engine`, which runs on a thread of its own. http: the class of its connections."""
    with serving_app(make_app(engine, ServerSettings(**settings)), http) as url:  # type: ignore[arg-type]
        yield url


@contextlib.contextmanager
def serving_app(app: ASGIApp, http: type[asyncio.Protocol] | None = None) -> Iterator[str]:
    """The URL of a server of `app`, which runs on a thread of its own. http: the class of its connections."""
    sock = bind("127.0.0.1", 0)
    config = uvicorn.Config(app, http=http or http_protocol(), log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
