"""Make requests that can run from prompts and settings: lengths, ids and seeds are checked and resolved here."""

from __future__ import annotations

import operator
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from tinyvllm.config import Capacity, ModelConfig, SamplingParams
from tinyvllm.engine.messages import NewRequest
from tinyvllm.errors import RequestError
from tinyvllm.scheduling.block_hashes import make_hash_seed
from tinyvllm.scheduling.request import Constraint, Request
from tinyvllm.scheduling.scheduler import check_length, max_request_len
from tinyvllm.text.grammar import Grammar

Encode = Callable[[str], list[int]]

SEED_MASK = 0xFFFFFFFF  # the graph's seeds are 32 bits wide


class RequestFactory:
    """Makes requests from prompts and settings. Owns the generator of seeds for requests without one."""

    def __init__(
        self,
        vocab_size: int,
        capacity: Capacity,
        eos_ids: frozenset[int],
        seed: int | str,
        encode: Encode | None = None,
    ) -> None:
        """vocab_size: width of the logits. encode: text to ids, without BOS and EOS; needed for bad words only."""
        self.vocab_size = vocab_size
        self.capacity = capacity
        self.eos_ids = eos_ids
        self._encode = encode
        self._seeds = random.Random(seed)

    def make(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        grammar: Grammar | None = None,
        cache_salt: str | None = None,
        adapter: str = "",
    ) -> list[NewRequest]:
        """One request per choice, params.n in all; choice i has the seed of choice 0 plus i.

        grammar: params.grammar, compiled. cache_salt: the prefix cache is shared only with requests of the same salt.
        adapter: the key of the adapter to run with; "": none. Raises RequestError for an empty prompt, ids outside the
        vocabulary or an empty salt, and ContextLengthError if the prompt and max_tokens (or one token, if max_tokens is
        None) do not fit.
        """
        assert (grammar is None) == (params.grammar is None), "a grammar must be compiled first"
        prompt = self._check_ids(prompt_ids, "prompt")
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        self._check_ids(params.allowed_token_ids or (), "allowed_token_ids")
        self._check_ids(tuple(params.logit_bias), "logit_bias")
        bad_words_ids = self._encode_bad_words(params.bad_words)
        check_length(len(prompt), params.max_tokens, self.capacity)
        max_tokens = params.max_tokens
        if max_tokens is None:
            max_tokens = max_request_len(self.capacity) - len(prompt)
        if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
            raise RequestError(
                "cache_salt must be a string that is not empty: leave it out to share", param="cache_salt"
            )
        hash_seed = make_hash_seed(cache_salt, adapter.rpartition(":")[2])
        seed = self._seeds.getrandbits(32) if params.seed is None else params.seed
        return [
            NewRequest(
                request_id if params.n == 1 else f"{request_id}:{index}",
                prompt,
                params if params.grammar is None else replace(params, grammar=None),
                eos_ids=frozenset() if params.ignore_eos else self.eos_ids,
                max_tokens=max_tokens,
                seed=(seed + index) & SEED_MASK,
                priority=priority,
                arrival_s=time.monotonic(),
                grammar=None if grammar is None else grammar.source,
                bad_words_ids=bad_words_ids,
                num_prompt_logprobs=None if index else params.prompt_logprobs,  # all choices share the prompt
                hash_seed=hash_seed,
                adapter=adapter,
            )
            for index in range(params.n)
        ]

    def make_requests(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        grammar: Grammar | None = None,
        cache_salt: str | None = None,
        adapter: str = "",
    ) -> list[Request]:
        """`make`, for a caller that steps the engine itself."""
        new = self.make(request_id, prompt_ids, params, priority, grammar, cache_salt, adapter)
        return [to_request(one, None if grammar is None else grammar.matcher()) for one in new]

    def _encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each word, at the start of a text and after a space."""
        if not words:
            return ()
        assert self._encode is not None, "bad words need a tokenizer"
        spellings = [spelling for word in words for spelling in (word, " " + word.lstrip())]
        encoded = dict.fromkeys(tuple(self._encode(spelling)) for spelling in spellings)
        if () in encoded:
            raise RequestError("bad_words has a text that the tokenizer encodes to no tokens", param="bad_words")
        return tuple(encoded)

    def _check_ids(self, token_ids: Sequence[int], param: str) -> list[int]:
        try:
            ids = [operator.index(token_id) for token_id in token_ids]  # NumPy's integers too
        except TypeError as error:
            raise RequestError(f"{param} has a token id that is not an integer: {error}", param=param) from None
        for token_id in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"{param} has the token id {token_id}, but the vocabulary's ids are 0 to {self.vocab_size - 1}",
                    param=param,
                )
        return ids


def require_head(model_config: ModelConfig) -> None:
    """Raise RequestError for a model that cannot generate."""
    if not model_config.has_head:
        raise RequestError(
            f"{model_config.name} has no language model's head, so it generates nothing: use "
            f"{'/v1/rerank or /v1/score' if model_config.num_labels else '/v1/embeddings'}"
        )


def to_request(new: NewRequest, constraint: Constraint | None) -> Request:
    """The scheduler's request. constraint: a matcher of its own, if the request has a grammar."""
    return Request(
        new.request_id,
        new.prompt_ids,
        new.params,
        eos_ids=new.eos_ids,
        max_tokens=new.max_tokens,
        seed=new.seed,
        priority=new.priority,
        arrival_s=new.arrival_s,
        constraint=constraint,
        bad_words_ids=new.bad_words_ids,
        num_prompt_logprobs=new.num_prompt_logprobs,
        pooling=new.pooling,
        hash_seed=new.hash_seed,
        adapter=new.adapter,
    )
