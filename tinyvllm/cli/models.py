"""`tinyvllm pull` and `tinyvllm models`, and making sure that a model is here before an engine starts."""

from __future__ import annotations

from typing import Annotated

from rich.markup import escape
from typer import Argument

from tinyvllm.cli.terminal import out, progress_bars
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.catalog import CATALOG, DEFAULT_MODEL

_NAME_HELP = "A catalog name (see `tinyvllm models`), or org/name of the Hugging Face hub."


def pull(*, name: Annotated[str, Argument(metavar="NAME", help=_NAME_HELP)] = DEFAULT_MODEL) -> None:
    """Download a model: checked, and complete or not at all."""
    out.print(f"{name} is in {download(name).path}", highlight=False, markup=False)


def download(name: str) -> ModelFiles:
    """Pull `name`, with a progress bar, unless it is here."""
    from tinyvllm.storage import pull as storage_pull
    from tinyvllm.storage.resolve import models_dir

    with progress_bars(in_bytes=True) as report:
        return storage_pull.pull(name, models_dir(), report)


def require_model(model: str, *, pull: bool) -> ModelFiles:
    """The model's files. Raises ModelError, which says how to get them, if they are not here; `pull` gets them."""
    from tinyvllm.storage.resolve import is_pullable, resolve_model

    try:
        return resolve_model(model)
    except UnsupportedModelError:
        raise
    except ModelError:
        if not pull or not is_pullable(model):
            raise
        return download(model)


def models() -> None:
    """List the catalog and the models that are here."""
    from rich.table import Table

    from tinyvllm.storage.resolve import list_models, models_dir

    directory = models_dir()
    table = Table("MODEL", "SIZE", "HERE", "DESCRIPTION", box=None, pad_edge=False)
    installed = {model.name: model for model in list_models(directory)}
    for name, entry in CATALOG.items():
        table.add_row(
            name, _megabytes(entry.num_bytes), "yes" if name in installed else "no", escape(entry.description)
        )
    for name, model in installed.items():
        if name not in CATALOG:
            table.add_row(escape(name), _megabytes(model.num_bytes), "yes", escape(str(model.path)))
    out.print(table, soft_wrap=False)
    out.print(f"\nModels are kept in {directory}. To get one: tinyvllm pull MODEL", highlight=False, markup=False)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
