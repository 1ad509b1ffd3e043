"""`tinyvllm models`, and finding or downloading a model before an engine starts."""

from __future__ import annotations

from typing import Annotated

from rich.markup import escape
from typer import Exit, Option

from tinyvllm.cli.terminal import err, out, progress_bars
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.catalog import CATALOG


def download(name: str) -> ModelFiles:
    """Download `name` with a progress bar, unless it is already here."""
    from tinyvllm.storage import pull as storage_pull
    from tinyvllm.storage.resolve import models_dir

    if name in CATALOG and CATALOG[name].terms:
        err.print(CATALOG[name].terms, highlight=False, markup=False, soft_wrap=True)
    with progress_bars(in_bytes=True) as report:
        return storage_pull.pull(name, models_dir(), report)


def require_model(model: str, *, pull: bool) -> ModelFiles:
    """The model's files. `pull`: download them if they are not here; otherwise ModelError says how to get them."""
    from tinyvllm.storage.resolve import is_pullable, resolve_model

    try:
        return resolve_model(model)
    except UnsupportedModelError:
        raise
    except ModelError:
        if not pull or not is_pullable(model):
            raise
        return download(model)


def models(
    *,
    check: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            help="Instead of the list: say of a model, file or directory what it is, in which formats, how much memory "
            "it takes, which context fits, and what its kernels are, or why it does not run. Nothing is loaded.",
        ),
    ] = None,
    device_memory: Annotated[
        str | None,
        Option(
            metavar="SIZE",
            help="With --check: free memory of the device, such as 16GiB. [default: that of this computer's device]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        Option(metavar="DEVICE", help="With --check: METAL, CUDA, CL or CPU. [default: this computer's]"),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="With --check: print one JSON document.")] = False,
) -> None:
    """List the models of the catalog and those downloaded, or check one.

    Exits with code 1 if the model that was checked cannot run."""
    if check is not None:
        _check(check, device, device_memory, as_json=as_json)
        return
    _list()


def _check(name: str, device: str | None, device_memory: str | None, *, as_json: bool) -> None:
    from tinyvllm.cli.model_check import check_model, parse_size, print_check, print_json

    result = check_model(name, device, parse_size(device_memory))
    if as_json:
        print_json(result)
    else:
        print_check(result)
    if not result.runs:
        raise Exit(1)


def _list() -> None:
    from rich.table import Table

    from tinyvllm.storage.resolve import list_models, models_dir

    directory = models_dir()
    table = Table("MODEL", "SIZE", "DOWNLOADED", "DESCRIPTION", box=None, pad_edge=False)
    installed = {model.name: model for model in list_models(directory)}
    for name, entry in CATALOG.items():
        problem = installed[name].problem if name in installed else ""
        state = "damaged" if problem else "yes" if name in installed else "no"
        table.add_row(name, _megabytes(entry.num_bytes), state, escape(problem or entry.description))
    for name, model in installed.items():
        if name not in CATALOG:
            text = model.problem or str(model.path)
            table.add_row(
                escape(name), _megabytes(model.num_bytes), "damaged" if model.problem else "yes", escape(text)
            )
    out.print(table, soft_wrap=False)
    out.print(f"\nModels are kept in {directory}. To download one: tinyvllm pull MODEL", highlight=False, markup=False)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
