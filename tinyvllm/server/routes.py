"""OpenAI's routes, and the few of vLLM's that clients of OpenAI's use."""

from __future__ import annotations

from fastapi import APIRouter

from tinyvllm.server import chat, completions, embeddings, models, responses

router = APIRouter()
for part in (models, completions, chat, responses, embeddings):
    router.include_router(part.router)
