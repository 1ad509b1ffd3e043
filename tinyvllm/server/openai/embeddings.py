"""/v1/embeddings: the pooled hidden states of texts."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from tinyvllm.profiling import measure
from tinyvllm.server.context import request_span
from tinyvllm.server.intake import ERRORS, check_ids, json_response, make_heading, require_model
from tinyvllm.server.openai.protocol.common import truncated
from tinyvllm.server.openai.protocol.embeddings import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import until_disconnect
from tinyvllm.server.text_limits import fit
from tinyvllm.server.workers import on_thread

router = APIRouter(responses=ERRORS)


@router.post("/v1/embeddings", response_model=EmbeddingList)
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """A unit vector for each text: of its hidden states after the last norm, the mean, the first token's or the last
    one's. Which, the model's own files say; without them, the mean."""
    return await until_disconnect(request.receive, _embed(state_of(request), body))


async def _embed(state: ServerState, body: EmbeddingRequest) -> Response:
    arrival_s = time.perf_counter()
    state.require_ready()
    require_model(state, body.model)
    model = state.engine.model_config
    body.refuse_unsupported(model.hidden_size, is_embedding_model=model.pooling is not None)
    texts = await on_thread(_read_inputs, state, body)
    heading = make_heading(state, "embd-")
    tasks = [
        asyncio.ensure_future(
            state.embed(
                ids,
                body.pooling or model.pooling or "mean",
                request_id=f"{heading.id}-{index}",
                arrival_s=arrival_s,
                priority=body.priority or 0,
            )
        )
        for index, ids in enumerate(texts)
    ]
    try:
        vectors = await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # if one fails or the client leaves, the others stop
            task.cancel()
    num_tokens = sum(map(len, texts))
    data = [Embedding(index=index, embedding=body.encoded(vector)) for index, vector in enumerate(vectors)]
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return json_response(
        EmbeddingList(id=heading.id, created=heading.created, model=heading.model, data=data, usage=usage)
    )


def _read_inputs(state: ServerState, body: EmbeddingRequest) -> list[list[int]]:
    """Each text's token ids. Runs on a worker thread."""
    texts: list[list[int]] = []
    fitted = fit(state, param="input", is_cut=body.truncate_prompt_tokens is not None)
    for text in body.input:
        ids, adds_special = text, isinstance(text, str) and body.add_special_tokens is not False
        if isinstance(text, str):
            with request_span(measure.TOKENIZE):
                ids = state.engine.tokenizer.encode(fitted(text), add_special_tokens=adds_special)
        ids = truncated(
            state.engine.tokenizer,
            ids,
            body.truncate_prompt_tokens,
            room=state.context_limit - 1,
            keeps_end=body.truncation_side == "left",  # vLLM's default for embeddings is the beginning
            has_special_tokens=adds_special,
        )
        check_ids(state, ids, None, param="input")
        texts.append(ids)
    return texts
