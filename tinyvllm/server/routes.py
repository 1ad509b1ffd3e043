"""The files that have routes: ours, OpenAI's, and the few of vLLM's that OpenAI clients use."""

from __future__ import annotations

import importlib

from fastapi import FastAPI

# Files in this directory, each with a `router`. Requests look for their route in this order: the busiest come first.
ROUTES = (
    "completions",
    "chat",
    "responses",
    "embeddings",
    "models",
    "operations",
    "profile_routes",
)


def include_routes(app: FastAPI) -> None:
    """Add the routes of every file in ROUTES."""
    for name in ROUTES:
        app.include_router(importlib.import_module(f"tinyvllm.server.{name}").router)
