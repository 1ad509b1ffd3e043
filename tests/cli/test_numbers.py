"""Numbers that no flag can mean, and limits of the system: a sentence, not a traceback."""

from __future__ import annotations

import errno
import inspect
import math
import resource
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from tinyvllm.cli import serve as serve_module
from tinyvllm.cli.commands import app
from tinyvllm.errors import TinyvllmError
from tinyvllm.processes import MIN_ADDRESS_BYTES, explain_limit, require_memory_limit
from tinyvllm.server import child


def numeric_flags(command: Any) -> list[tuple[str, bool]]:
    """Each flag that takes a number, and whether it may have a fraction."""
    found = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *details = get_args(parameter.annotation)
        kinds = get_args(kind) or (kind,)
        if {float, int} & set(kinds) and not any(type(one).__name__ == "ArgumentInfo" for one in details):
            found.append((f"--{name.replace('_', '-')}", float in kinds))
    return found


def leaves(group: typer.Typer, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """The functions of the commands, by the commands' words."""
    found = [
        ((*path, one.name or one.callback.__name__.replace("_", "-")), one.callback)  # type: ignore[union-attr]
        for one in group.registered_commands
    ]
    for inner in group.registered_groups:
        found += leaves(inner.typer_instance, (*path, inner.name or inner.typer_instance.info.name))  # type: ignore
    return found


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    return result


def test_no_flag_takes_a_number_that_is_not_finite_or_out_of_bounds() -> None:
    num_flags = 0
    for _, command in leaves(app):
        for flag, has_fraction in numeric_flags(command):
            num_flags += 1
            for value in (math.inf, math.nan, -math.inf, 1e10) if has_fraction else (10**30, -(10**5000)):
                with pytest.raises(TinyvllmError, match=f"{flag} is .*: give a number between"):
                    command(**{flag.strip("-").replace("-", "_"): value})
    assert num_flags > 100
    result = run("serve", "x", "--idle-timeout", "1e400")
    assert result.exit_code == 1 and result.output.startswith("error: --idle-timeout is inf: give")
    for flag, most in (("max-step-stretch", "1e+09"), ("gpu-memory-utilization", "1"), ("kv-disk-size", str(2**20))):
        result = run("serve", "x", f"--{flag}", "nan")
        assert result.output == f"error: --{flag} is nan: give a number between 0 and {most}\n"


def test_serve_takes_or_refuses_every_other_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "_serve_one", lambda *arguments: None)
    monkeypatch.setattr(child, "prepare_process", lambda: None)
    command = dict(leaves(app))[("serve",)]
    defaults = {name: one.default for name, one in inspect.signature(command).parameters.items()}
    for flag, has_fraction in numeric_flags(command):
        name = flag.strip("-").replace("-", "_")
        for value in (-1.0, 0.0, 1e9, 1e-300, -0.0) if has_fraction else (-1, 0, 10**9):
            try:
                command(**defaults | {"model": ["x"], name: value})
            except TinyvllmError as error:
                assert name in str(error).replace("-", "_") or "no model" in str(error), (flag, value)


def test_a_limit_of_the_system_is_a_sentence_with_a_remedy() -> None:
    for error, remedy in (
        (MemoryError(), "ulimit -v"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "ulimit -v"),
        (ImportError("much text\nlibx.so: failed to map segment from shared object"), "libx.so: failed to map"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    ):
        advice = explain_limit(error)
        assert advice is not None and remedy in advice and "\n" not in advice
    assert explain_limit(RuntimeError("other")) is None and explain_limit(OSError(errno.ENOENT, "x")) is None


def test_the_command_shows_it_as_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(serve_module, "_serve_one", fail)
    result = run("serve", "x")
    assert result.exit_code == 1 and "error: this process may start no more threads" in result.output


def test_too_little_address_space_is_refused_before_a_library_aborts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (MIN_ADDRESS_BYTES - 1, resource.RLIM_INFINITY))
    with pytest.raises(TinyvllmError, match=r"1023 MiB of memory, but needs 1024 MiB .*ulimit -v"):
        require_memory_limit()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    require_memory_limit()
