"""How relevant a document is to a query, by the method that the model supports.

- An embedding model: the cosine of the two texts' embeddings.
- A reranker: Qwen3-Reranker's prompt asks whether the document meets the query. The score is the probability of "yes"
  next to "no" as the answer, or the sigmoid of a classifier's only logit where the model was converted to one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tinyvllm.errors import RequestError
from tinyvllm.profiling import measure
from tinyvllm.server.context import request_span
from tinyvllm.server.intake import check_ids
from tinyvllm.server.text_limits import fit
from tinyvllm.server.workers import on_thread

if TYPE_CHECKING:
    from tinyvllm.server.state import ServerState
    from tinyvllm.text.tokenizer import Tokenizer

T = TypeVar("T")

# The model card of Qwen3-Reranker
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Pair:
    query: str
    document: str


@dataclass(frozen=True)
class Scores:
    """A score for each pair, and the number of tokens that were computed."""

    values: list[float]
    num_tokens: int


@dataclass(frozen=True)
class Judge:
    """Scores the pairs of one request."""

    state: ServerState
    request_id: str
    arrival_s: float
    priority: int
    param: str  # the request's field with documents
    instruction: str = INSTRUCTION
    num_prompt_tokens: int | None = None  # of a query with its document that are kept; -1: as many as fit
    num_document_tokens: int | None = None  # of a document that are kept
    gives_logits: bool = False  # instead of probabilities

    async def score(self, pairs: Sequence[Pair]) -> Scores:
        """Raises RequestError for a model that cannot judge, and what admission and the engine raise."""
        model = self.state.engine.model_config
        if model.num_labels > 1:
            raise RequestError(
                f"this model has {model.num_labels} labels: a reranker has one, whose logit is the score"
            )
        if self.num_document_tokens is not None:
            pairs = await on_thread(self._shorten, pairs)
        if model.pooling is not None:
            return await self._compare(pairs)
        answers = None if model.num_labels else answer_ids(self.state.engine.tokenizer)
        prompts = await on_thread(self._prompts, pairs)
        each = [self._judge(number, ids, answers) for number, ids in enumerate(prompts)]
        return Scores(await _gather(each), sum(map(len, prompts)))

    async def _compare(self, pairs: Sequence[Pair]) -> Scores:
        texts = list(dict.fromkeys(text for pair in pairs for text in (pair.query, pair.document)))
        ids = await on_thread(self._encode, texts)
        pooling = self.state.engine.model_config.pooling or "mean"
        vectors = await _gather([self._embed(number, one, pooling) for number, one in enumerate(ids)])
        found = dict(zip(texts, vectors, strict=True))
        return Scores([float(found[pair.query] @ found[pair.document]) for pair in pairs], sum(map(len, ids)))

    async def _judge(self, number: int, ids: list[int], answers: tuple[int, int] | None) -> float:
        """The probability that the answer is yes, or its logit."""
        if answers is None:
            logit = float((await self._embed(number, ids, "score"))[0])
        else:
            no, yes = await self.state.logprobs_of(
                ids, answers, request_id=f"{self.request_id}-{number}", arrival_s=self.arrival_s, priority=self.priority
            )
            logit = yes - no
        return logit if self.gives_logits else 1.0 / (1.0 + math.exp(min(-logit, 700.0)))

    def _embed(self, number: int, ids: list[int], pooling: str) -> Awaitable[np.ndarray]:
        return self.state.embed(
            ids,
            pooling,
            request_id=f"{self.request_id}-{number}",
            arrival_s=self.arrival_s,
            priority=self.priority,
        )

    # -- on a worker thread -------------------------------------------------------------------------------------------

    def _shorten(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs, with the beginning of each document."""
        tokenizer, limit = self.state.engine.tokenizer, self.num_document_tokens

        def beginning(text: str) -> str:
            start = tokenizer.without_middle(text, limit or 0)
            ids = tokenizer.encode(start, add_special_tokens=False, parse_special=False)
            # the last character may be cut
            return text if len(ids) <= (limit or 0) else tokenizer.decode(ids[:limit]).rstrip("\ufffd")

        with request_span(measure.TOKENIZE):
            return [Pair(pair.query, beginning(pair.document)) for pair in pairs]

    def _cut(self, ids: list[int], num_others: int, *, has_special_tokens: bool) -> list[int]:
        """The beginning of a text, with room for `num_others` tokens around it."""
        if self.num_prompt_tokens is None:
            return ids
        fitting = self.state.context_limit - 1
        kept = (fitting if self.num_prompt_tokens == -1 else self.num_prompt_tokens) - num_others
        if kept < 1:
            raise RequestError(
                f"truncate_prompt_tokens is {self.num_prompt_tokens}, but the prompt around the texts has {num_others} "
                "tokens: give more",
                param="truncate_prompt_tokens",
            )
        return self.state.engine.tokenizer.cut(ids, kept, keeps_end=False, has_special_tokens=has_special_tokens)

    def _fitted(self, text: str) -> str:
        return fit(self.state, param=self.param, is_cut=self.num_prompt_tokens is not None)(text)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        with request_span(measure.TOKENIZE):
            encoded = [self.state.engine.tokenizer.encode(self._fitted(text)) for text in texts]
        encoded = [self._cut(ids, 0, has_special_tokens=True) for ids in encoded]
        for ids in encoded:
            check_ids(self.state, ids, None, param=self.param)
        return encoded

    def _prompts(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Marks of the prompt's format in a query or a document are text."""
        tokenizer = self.state.engine.tokenizer
        with request_span(measure.TOKENIZE):
            prefix, suffix = (tokenizer.encode(text, add_special_tokens=False) for text in (PREFIX, SUFFIX))
            asked = [
                tokenizer.encode(
                    self._fitted(f"<Instruct>: {self.instruction}\n<Query>: {pair.query}\n<Document>: {pair.document}"),
                    add_special_tokens=False,
                    parse_special=False,
                )
                for pair in pairs
            ]
        num_others = len(prefix) + len(suffix)
        asked = [self._cut(ids, num_others, has_special_tokens=False) for ids in asked]
        prompts = [[*prefix, *ids, *suffix] for ids in asked]
        for ids in prompts:
            check_ids(self.state, ids, 1, param=self.param)
        return prompts


def answer_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens "no" and "yes". Raises RequestError for a model that does not have both, or not the prompt's marks."""
    no, yes, mark = (tokenizer.encode(text, add_special_tokens=False) for text in ("no", "yes", "<|im_start|>"))
    if not len(no) == len(yes) == len(mark) == 1:
        raise RequestError(
            "this model is no reranker: serve Qwen3-Reranker, a classifier made of it, or an embedding model"
        )
    return no[0], yes[0]


async def _gather(each: Sequence[Awaitable[T]]) -> list[T]:
    """The results, in order. If one fails or the client leaves, the others stop."""
    tasks = [asyncio.ensure_future(one) for one in each]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
