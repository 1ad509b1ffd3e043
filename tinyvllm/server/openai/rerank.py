"""/v1/rerank and /v1/score: how relevant documents are to a query."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from tinyvllm.server.intake import ERRORS, answering_model, json_response, make_heading, require_model
from tinyvllm.server.openai.protocol.rerank import (
    Document,
    Relevance,
    RerankAnswer,
    RerankRequest,
    Score,
    ScoreList,
    ScoreRequest,
    ScoreUsage,
)
from tinyvllm.server.openai.relevance import INSTRUCTION, Judge, Pair, Scores
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.streaming import until_disconnect

router = APIRouter(responses=ERRORS)


@router.post("/v1/rerank", response_model=RerankAnswer)
@router.post("/v2/rerank", response_model=RerankAnswer, include_in_schema=False)  # Cohere's
@router.post("/rerank", response_model=RerankAnswer, include_in_schema=False)  # vLLM's, as the next
async def rerank(body: RerankRequest, request: Request) -> Response:
    """The documents in the order of their relevance to the query, each with a score."""
    return await until_disconnect(request.receive, _rerank(state_of(request), body))


@router.post("/v1/score", response_model=ScoreList)
@router.post("/score", response_model=ScoreList, include_in_schema=False)
async def score(body: ScoreRequest, request: Request) -> Response:
    """The relevance of each text of `text_2` to that of `text_1`."""
    return await until_disconnect(request.receive, _score(state_of(request), body))


async def _rerank(state: ServerState, body: RerankRequest) -> Response:
    pairs = [Pair(body.query, document) for document in body.documents]
    request_id, scores = await _judge(state, body, pairs, "rerank-", "documents")
    best = sorted(range(len(pairs)), key=lambda index: -scores.values[index])  # equal ones in the request's order
    keeps = body.return_documents is not False
    results = [
        Relevance(
            index=index,
            relevance_score=scores.values[index],
            document=Document(text=body.documents[index]) if keeps else None,
        )
        for index in best[: body.top_n or None]
    ]
    usage = ScoreUsage(prompt_tokens=scores.num_tokens, total_tokens=scores.num_tokens)
    return json_response(RerankAnswer(id=request_id, model=answering_model(state), results=results, usage=usage))


async def _score(state: ServerState, body: ScoreRequest) -> Response:
    pairs = [Pair(query, document) for query, document in body.pairs]
    request_id, scores = await _judge(state, body, pairs, "score-", "text_2")
    return json_response(
        ScoreList(
            id=request_id,
            created=int(time.time()),
            model=answering_model(state),
            data=[Score(index=index, score=value) for index, value in enumerate(scores.values)],
            usage=ScoreUsage(prompt_tokens=scores.num_tokens, total_tokens=scores.num_tokens),
        )
    )


async def _judge(
    state: ServerState, body: RerankRequest | ScoreRequest, pairs: list[Pair], prefix: str, param: str
) -> tuple[str, Scores]:
    """(the answer's id, the scores)."""
    arrival_s = time.perf_counter()
    state.require_ready()
    require_model(state, body.model)
    body.refuse_unsupported()
    heading = make_heading(state, prefix)
    judge = Judge(
        state=state,
        request_id=heading.id,
        arrival_s=arrival_s,
        priority=body.priority or 0,
        param=param,
        instruction=body.instruction or INSTRUCTION,
        num_prompt_tokens=body.truncate_prompt_tokens,
        num_document_tokens=body.max_tokens_per_doc if isinstance(body, RerankRequest) else None,
        gives_logits=body.use_activation is False,
    )
    return heading.id, await judge.score(pairs)
