"""The `tinyvllm` command. Flags become settings here. Heavy imports happen inside the commands that need them."""

from tinyvllm.cli.commands import app, main

__all__ = ["app", "main"]
