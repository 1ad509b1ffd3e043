"""The served model and its tokenizer: /v1/models, /tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from tinyvllm.errors import RequestError
from tinyvllm.server.conversation import make_prompt
from tinyvllm.server.intake import ERRORS, require_model
from tinyvllm.server.openai.chat import conversation_of
from tinyvllm.server.openai.protocol.common import ModelCard, ModelList
from tinyvllm.server.openai.protocol.generation import refuse_extras
from tinyvllm.server.openai.protocol.tokens import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    TokenizerInfo,
)
from tinyvllm.server.shelf import ShelvedModel, find_model, shelf_of
from tinyvllm.server.state import ServerState, state_of
from tinyvllm.server.text_limits import fit_for_counting
from tinyvllm.server.workers import on_thread

_PIECE_ITEMS = 2**15

router = APIRouter(responses=ERRORS)


@router.get("/v1/models")
@router.head("/v1/models", include_in_schema=False)
async def list_models(request: Request) -> ModelList:
    state_of(request).require_engine()
    return ModelList(data=[_card(model, name) for model in shelf_of(request).models() for name in model.names])


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, request: Request) -> ModelCard:
    state = state_of(request)
    require_model(state, model_id)
    state.require_engine()
    model = find_model(shelf_of(request).models(), model_id)
    assert model is not None, "the shelf has every name that require_model accepts"
    return _card(model, model_id)


def _card(model: ShelvedModel, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=model.created,
        root=model.root,
        parent=model.parent,
        max_model_len=model.max_model_len,
        state=model.state,
    )


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The token ids of a text, or of messages as the chat template renders them."""
    state = state_of(request)
    state.require_engine()
    require_model(state, body.model)
    body.check()
    refuse_extras(body.model_extra or {})
    return await on_thread(_tokenize, state, body)


def _tokenize(state: ServerState, body: TokenizeRequest) -> Response:
    """Runs on a worker thread."""
    tokenizer = state.engine.tokenizer
    if body.prompt is not None:
        prompt = fit_for_counting(state, param="prompt")(body.prompt)
        ids = tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        chat = body.as_chat()
        chat.refuse_unsupported()
        ids = make_prompt(conversation_of(chat), state.engine, fit_for_counting(state, param="messages")).ids
    head = Tokenized(count=len(ids), max_model_len=state.engine.capacity.max_model_len, tokens=[])
    texts = [tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    lists = {"tokens": ids, "token_strs": texts}
    return Response(json_with_lists(head.model_dump(), lists), media_type="application/json")


def json_with_lists(head: Mapping[str, object], lists: Mapping[str, Sequence[object] | None]) -> bytes:
    """JSON of an object with long lists, made a piece at a time, so that other threads run in between."""
    fields = {name: json.dumps(value) for name, value in head.items()}
    for name, values in lists.items():
        if values is not None:
            pieces = (json.dumps(values[at : at + _PIECE_ITEMS])[1:-1] for at in range(0, len(values), _PIECE_ITEMS))
            fields[name] = f"[{', '.join(pieces)}]"
    return ("{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items()) + "}").encode()


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Detokenized:
    """The text of token ids, including special tokens."""
    state = state_of(request)
    state.require_engine()
    require_model(state, body.model)
    return await on_thread(_detokenize, state, body)


def _detokenize(state: ServerState, body: DetokenizeRequest) -> Detokenized:
    vocab_size = state.engine.model_config.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"tokens has the id {token_id}, but the vocabulary's are 0 to {vocab_size - 1}", param="tokens"
            )
    return Detokenized(prompt=state.engine.tokenizer.decode(body.tokens, skip_special_tokens=False))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> TokenizerInfo:
    """What clients need to use this server as their tokenizer."""
    state = state_of(request)
    state.require_engine()
    engine = state.engine
    tokenizer, template = engine.tokenizer, engine.chat_template

    def text(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.token_text(token_id)

    return TokenizerInfo(
        tokenizer_class="TinyvllmTokenizer",
        vocab_size=tokenizer.vocab_size,
        model_max_length=engine.capacity.max_model_len,
        bos_token=text(tokenizer.bos_id),
        eos_token=text(tokenizer.eos_id),
        pad_token=text(tokenizer.eos_id),
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        chat_template=None if template is None else template.sources.get("default"),
    )
