"""The files that have routes: ours, OpenAI's, and the few of vLLM's that OpenAI clients use."""

from __future__ import annotations

import importlib

from fastapi import FastAPI

# Files in this directory, each with a `router`.
ROUTES = (
    "operations",
    "models",
    "completions",
    "chat",
    "responses",
    "embeddings",
    "profile_routes",
)


def include_routes(app: FastAPI) -> None:
    """Add the routes of every file in ROUTES."""
    for name in ROUTES:
        app.include_router(importlib.import_module(f"tinyvllm.server.{name}").router)
