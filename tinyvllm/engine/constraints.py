"""Compile grammars off the engine's thread: each one once, and within a time limit."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from tinyvllm.config import GrammarSpec
from tinyvllm.errors import RequestError
from tinyvllm.text.grammar import Grammar, GrammarLimits, Vocabulary, compile_grammar, compile_source
from tinyvllm.text.tokenizer import Tokenizer

NUM_THREADS = 2  # so that one slow grammar does not block the next
MAX_GRAMMARS = 256  # compiled grammars in the cache
MAX_WAITING = 64  # grammars that wait for a thread


class GrammarCompiler:
    """Compiles grammar specs. Owns the compiler threads and a cache of the most recently used grammars.

    May be called from any thread. The compiler releases the GIL, so neither the engine's steps nor the event loop
    wait. If the caller gives up, the thread still stops at the compiler's own limits, which count work.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: frozenset[int],
        limits: GrammarLimits = GrammarLimits(),  # noqa: B008 - frozen
    ) -> None:
        """vocab_size: width of the logits. The tokenizer is first read for the first grammar."""
        self.vocab_size = vocab_size
        self._make_vocabulary = partial(Vocabulary, tokenizer, vocab_size, eos_ids)
        self._limits = limits
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tinyvllm-grammar")
        self._vocabulary: Vocabulary | None = None
        self._vocabulary_lock = threading.Lock()
        self._lock = threading.Lock()
        self._grammars: OrderedDict[GrammarSpec, Future[Grammar]] = OrderedDict()
        self._by_source: OrderedDict[str, Future[Grammar]] = OrderedDict()
        self._num_waiting = 0

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """The compiled grammar, cached or new. Raises RequestError if it is invalid, too large or too slow."""
        future = asyncio.wrap_future(self._submit(spec))
        done, _ = await asyncio.wait([future], timeout=self._limits.compile_s)  # unlike wait_for, does not cancel
        if not done:
            future.add_done_callback(
                asyncio.Future.exception
            )  # retrieves the exception, so that asyncio does not log it
            raise self._too_slow(spec)
        return future.result()

    def compile_now(self, spec: GrammarSpec) -> Grammar:
        """`compile`, for a caller without an event loop."""
        future = self._submit(spec)
        try:
            return future.result(self._limits.compile_s)
        except TimeoutError:
            raise self._too_slow(spec) from None

    def prepare(self) -> None:
        """Read the tokenizer now, so that the first grammar need not wait for it."""
        self._read_vocabulary()

    def compile_source(self, source: str) -> Future[Grammar]:
        """The grammar whose source this is: compiled already, if `compile` made it in this process, or soon."""
        with self._lock:
            future = self._by_source.get(source)
            if future is None or (future.done() and future.exception() is not None):
                future = self._threads.submit(self._compile_source, source)
                self._keep(source, future)
            self._by_source.move_to_end(source)
            return future

    def _keep(self, source: str, future: Future[Grammar]) -> None:
        """Remember a grammar by its source. The caller holds the lock."""
        self._by_source[source] = future
        while len(self._by_source) > MAX_GRAMMARS:
            self._by_source.popitem(last=False)

    def _too_slow(self, spec: GrammarSpec) -> RequestError:
        return RequestError(
            f"{spec.param} took more than {self._limits.compile_s:g} s to compile: simplify it, or retry if the server "
            "was busy compiling others",
            param=spec.param,
        )

    def _submit(self, spec: GrammarSpec) -> Future[Grammar]:
        with self._lock:
            future = self._grammars.get(spec)
            if future is not None and not (future.done() and future.exception() is not None):
                self._grammars.move_to_end(spec)
                return future
            if self._num_waiting >= MAX_WAITING:
                raise RequestError(
                    f"{self._num_waiting} grammars are waiting to be compiled, which is the limit: retry later",
                    param=spec.param,
                )
            self._num_waiting += 1
            future = self._threads.submit(self._compile, spec)
            self._grammars[spec] = future
            while len(self._grammars) > MAX_GRAMMARS:
                self._grammars.popitem(last=False)
            return future

    def _compile(self, spec: GrammarSpec) -> Grammar:
        try:
            grammar = compile_grammar(spec, self._read_vocabulary(), self._limits)
        finally:
            with self._lock:
                self._num_waiting -= 1
        done: Future[Grammar] = Future()
        done.set_result(grammar)
        with self._lock:
            self._keep(grammar.source, done)
        return grammar

    def _compile_source(self, source: str) -> Grammar:
        return compile_source(source, self._read_vocabulary(), self._limits)

    def _read_vocabulary(self) -> Vocabulary:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            return self._vocabulary
