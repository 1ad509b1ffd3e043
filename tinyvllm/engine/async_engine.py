"""The engine for servers: event loops submit requests to it and receive their output.

The engine itself runs on a thread of this process (`AsyncEngine.start`), or in processes of its own
(`AsyncEngine.connect`). Text is made here, on the caller's side: the engine knows token ids only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tinyvllm.config import Capacity, EngineConfig, GenerationDefaults, ModelConfig, SamplingParams
from tinyvllm.engine.adapters import READ_S
from tinyvllm.engine.adapters import AdapterUse as AdapterUse
from tinyvllm.engine.admission import require_head
from tinyvllm.engine.client import ANSWER_S, Client, Reader
from tinyvllm.engine.client import Call as Call
from tinyvllm.engine.client import Receiver as Receiver
from tinyvllm.engine.hosts import Host, Loaded
from tinyvllm.engine.loading import LoadedEngine, Progress, load_engine, model_name
from tinyvllm.engine.output import Delta
from tinyvllm.engine.step_history import CompletedStep
from tinyvllm.engine.thread_host import ThreadHost
from tinyvllm.errors import DeviceError, EngineDeadError, RequestError
from tinyvllm.scheduling.adapter_slots import AdapterInfo as AdapterInfo  # for the rooms above, as those below
from tinyvllm.scheduling.block_hashes import pack_tokens
from tinyvllm.scheduling.plan import STEP_SIZES as STEP_SIZES  # for the rooms above, which may not import scheduling
from tinyvllm.scheduling.plan import StepStats as StepStats
from tinyvllm.text.chat import ChatTemplate
from tinyvllm.text.tokenizer import Tokenizer

POOLINGS = ("mean", "cls", "last", "score")
EMBEDDING_PARAMS = SamplingParams(temperature=0.0, max_tokens=1)  # one token is sampled and discarded
Load = Callable[[EngineConfig, Progress], LoadedEngine]


class AsyncEngine:
    """What servers use of the engine, wherever it runs. Every method may be called from any event loop."""

    def __init__(self, config: EngineConfig, host: Host) -> None:
        self.config = config
        self.created = int(time.time())
        self.served_model_name = model_name(config)
        self.default_adapter = ""  # the key of the adapter of requests that name none
        self._host = host

    @classmethod
    def start(cls, config: EngineConfig, progress: Progress | None = None, load: Load = load_engine) -> AsyncEngine:
        """Start an engine on a thread of this process, which loads the model, and return immediately.

        `progress` is called on that thread."""
        return cls(config, ThreadHost(config, progress, load))

    async def wait_ready(self) -> None:
        """Return when the engine can serve requests. Raises the error that stopped it from starting."""
        await self._host.wait_ready()

    @property
    def error(self) -> BaseException | None:
        """Why the engine did not start, or why it has stopped."""
        return self._host.error

    @property
    def is_ready(self) -> bool:
        return self._host.is_ready

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._loaded.chat_template

    @property
    def model_config(self) -> ModelConfig:
        return self._loaded.model_config

    @property
    def capacity(self) -> Capacity:
        """Of one engine; all engines are alike."""
        return self._loaded.capacity

    @property
    def generation_defaults(self) -> GenerationDefaults:
        return self._loaded.generation_defaults

    @property
    def num_engines(self) -> int:
        return self._host.num_engines

    def engine_stats(self) -> list[StepStats]:
        """Counts and times of each engine's latest step."""
        return self._host.engine_stats()

    def stats(self) -> StepStats:
        """Of all engines together: sums of the counts, and the times of the latest step of any."""
        each = self.engine_stats()
        return each[0] if len(each) == 1 else StepStats.sum(each)

    async def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        receiver: Receiver,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: str = "",
    ) -> Call:
        """Start a request, whose output goes to `receiver`: at least one delta per choice, the last with a
        finish_reason. The caller closes the call.

        adapter: the key of a loaded adapter; "": none.

        Waits until the engine is ready and the grammar is compiled; without a grammar a ready engine does not suspend.
        Raises RequestError if the request is refused, and EngineDeadError if the engine has stopped.
        """
        if not self._host.is_ready:
            await self._host.wait_ready()
        loaded = self._loaded
        require_head(loaded.model_config)
        grammar = None if params.grammar is None else await loaded.grammars.compile(params.grammar)
        requests = loaded.factory.make(
            request_id, prompt_ids, params, priority, grammar, cache_salt, adapter or self.default_adapter
        )
        return self._client().open(request_id, requests, receiver)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """`submit` as an iterator over the deltas; those of a slow reader are merged, to one per choice.

        Raises what `submit` raises before the first delta, and EngineDeadError if the engine stops. Closing or
        canceling the generator aborts the request: its blocks are free at the next step.
        """
        reader = Reader()
        options: Any = {"priority": priority, "cache_salt": cache_salt, "adapter": adapter}
        call = await self.submit(prompt_ids, params, reader, request_id=request_id, **options)
        try:
            num_open = params.n
            while num_open:
                for delta in await reader.read():
                    num_open -= delta.finish_reason is not None
                    yield delta
        finally:
            call.close()

    async def embed(
        self, prompt_ids: Sequence[int], pooling: str = "mean", *, request_id: str, priority: int = 0, adapter: str = ""
    ) -> NDArray[np.float32]:
        """The prompt's embedding, (hidden,), normalized to length 1.

        pooling: "mean" of the hidden states after the final norm, the first token's ("cls") or the "last" one's.
        "score": a classifier's logits, (labels,), which are not normalized. Raises what `generate` raises, and
        DeviceError if the step failed.
        """
        if pooling not in POOLINGS:
            raise RequestError(f"pooling is {pooling!r}: choose one of {', '.join(POOLINGS)}", param="pooling")
        await self._host.wait_ready()
        [request] = self._loaded.factory.make(request_id, prompt_ids, EMBEDDING_PARAMS, priority, adapter=adapter)
        request.pooling = pooling
        reader = Reader()
        call = self._client().open(request_id, [request], reader)
        try:
            deltas: list[Delta] = []
            while not deltas or deltas[-1].finish_reason is None:
                deltas = await reader.read()
        finally:
            call.close()
        data = call.choices[0].pooled
        if data is None or deltas[-1].finish_reason not in ("stop", "length"):
            raise DeviceError(f"the prompt could not be embedded: {deltas[-1].error or deltas[-1].finish_reason}")
        pooled = np.frombuffer(data, np.float32)
        if not np.isfinite(pooled).all():
            raise DeviceError(
                f"the embedding of these {len(prompt_ids)} tokens is not finite: the weights of "
                f"{self.model_config.name}, or its kernels on this device, give NaN or infinity"
            )
        if pooling == "score":
            return pooled
        return np.asarray(pooled / max(float(np.linalg.norm(pooled)), 1e-12), np.float32)

    def abort(self, request_id: str) -> None:
        """End a request of any event loop: its receiver gets last deltas with finish_reason "abort".

        Ignored if it is unknown."""
        for loop, client in self._host.clients():
            if request_id in client.calls:
                loop.call_soon_threadsafe(client.abort, request_id)

    async def pool_states(self) -> list[bytes]:
        """The states of each engine's KV blocks, as `BlockManager.states` writes them. Raises EngineDeadError."""
        return await self._ask_all("pool_states")

    async def latest_steps(self) -> list[list[CompletedStep]]:
        """Each engine's latest steps, oldest first. Raises EngineDeadError."""
        answers = await self._ask_all("latest_steps")
        return [msgspec.convert(answer, list[CompletedStep], from_attributes=True) for answer in answers]

    async def look_up_prefix(
        self, prompt_ids: Sequence[int], cache_salt: str | None = None, adapter: str = ""
    ) -> list[list[int]]:
        """For each engine, the tokens of a prompt that it has cached: in its pool, there or in host memory, and there
        or on disk. adapter: the key of a loaded adapter; "": none. Raises RequestError for an empty salt, and
        EngineDeadError."""
        if not self._host.is_ready:
            await self._host.wait_ready()
        [request] = self._loaded.factory.make(
            "", prompt_ids, EMBEDDING_PARAMS, cache_salt=cache_salt, adapter=adapter or self.default_adapter
        )
        tokens = pack_tokens(request.prompt_ids).hex()
        return await self._ask_all("look_up_prefix", tokens, request.hash_seed.hex())

    async def reset_prefix_cache(self, *, reset_external: bool = False) -> None:
        """Forget all cached prefixes, on all engines. reset_external: also in host memory and on disk. Raises
        EngineDeadError."""
        await self._ask_all("reset_prefix_cache", *["external"] * reset_external)

    async def audit(self) -> list[dict[str, int]]:
        """Check each engine's pool, and count what it holds. Raises EngineDeadError, also for a pool with a fault."""
        return [msgspec.convert(answer, dict[str, int]) for answer in await self._ask_all("audit")]

    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters: those that all engines have."""
        return self._host.adapters()

    async def adapter_uses(self) -> list[list[AdapterUse]]:
        """Each engine's adapters, and the requests that use them. Raises EngineDeadError."""
        answers = await self._ask_all("adapter_uses")
        return [msgspec.convert(answer, list[AdapterUse], from_attributes=True) for answer in answers]

    async def load_adapter(self, name: str, path: str, *, replaces: bool = False) -> AdapterInfo:
        """Load an adapter from the directory `path` into every engine. Raises RequestError if one refuses it; the
        others then forget it, or load again what it was to replace. Raises EngineDeadError."""
        arguments = [name, path, "replaces" if replaces else ""]
        known = {info.name: info for info in self.adapters()}
        results = await self._tell_all("load_adapter", *arguments, timeout_s=READ_S)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors and len(errors) < len(results) and not await self._restore_adapter(known.get(name), results):
            await self._tell_all("unload_adapter", name)
        if errors:
            raise errors[0]
        return msgspec.convert(results[0], AdapterInfo, from_attributes=True)

    async def _restore_adapter(self, old: AdapterInfo | None, results: Sequence[Any]) -> bool:
        """Load an adapter again where another one has taken its name. results: each engine's answer. Whether all of
        these have it again: its files may have changed too."""
        if old is None:
            return False
        changed = [engine for engine, result in enumerate(results) if not isinstance(result, BaseException)]
        arguments = [old.name, old.path, "replaces"]
        answers = await self._tell_all("load_adapter", *arguments, timeout_s=READ_S, engines=changed)
        return not any(
            isinstance(answer, BaseException)
            or msgspec.convert(answer, AdapterInfo, from_attributes=True).key != old.key
            for answer in answers
        )

    async def unload_adapter(self, name: str) -> None:
        """Have every engine forget an adapter. Raises RequestError if none has it, and EngineDeadError."""
        results = await self._tell_all("unload_adapter", name)
        errors = [result for result in results if isinstance(result, BaseException)]
        if len(errors) == len(results):
            raise errors[0]

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Stop the engine if it runs in this process: refuse new requests, give the running ones `drain_s` seconds,
        abort the rest, and end the thread. Else abort this process's requests and disconnect."""
        await self._host.shutdown(drain_s)

    @property
    def _loaded(self) -> Loaded:
        loaded = self._host.loaded
        if loaded is None:
            raise EngineDeadError("the model is not loaded: await wait_ready() first") from self.error
        return loaded

    def _client(self) -> Client:
        return self._host.client(asyncio.get_running_loop())

    async def _tell_all(
        self, question: str, *arguments: str, timeout_s: float = ANSWER_S, engines: Sequence[int] | None = None
    ) -> list[Any]:
        """Each engine's answer, or the exception that stands for it. engines: those to ask; None: all."""
        client, engines = self._client(), range(self.num_engines) if engines is None else engines
        asked = (client.ask(question, engine, *arguments, timeout_s=timeout_s) for engine in engines)
        return await asyncio.gather(*asked, return_exceptions=True)

    async def _ask_all(self, question: str, *arguments: str) -> list[Any]:
        """The answers of the engines that can answer. Raises EngineDeadError if none can."""
        client = self._client()
        questions = (client.ask(question, engine, *arguments) for engine in range(self.num_engines))
        results = await asyncio.gather(*questions, return_exceptions=True)
        answers = [result for result in results if not isinstance(result, BaseException)]
        if not answers and isinstance(results[0], BaseException):
            raise results[0]
        return answers
