"""Ollama's API: https://github.com/ollama/ollama/blob/v0.32.15/docs/api.md."""
