"""The `tinyvllm` command. Flags become settings here; what is heavy is imported by the command that needs it."""

from tinyvllm.cli.main import app, main

__all__ = ["app", "main"]
