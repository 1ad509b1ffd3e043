"""The `tinyvllm` command. Flags become settings here. Heavy imports happen inside the commands that need them."""


def main() -> None:
    """The console script. Ctrl-C ends it without a traceback even while its modules are imported."""
    try:
        from tinyvllm.processes import collect_rarely

        collect_rarely()

        from tinyvllm.late_methods import make_methods_late

        make_methods_late()

        from tinyvllm.cli.commands import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells report it; `terminal.INTERRUPTED` is not imported yet
    run()


__all__ = ["main"]
