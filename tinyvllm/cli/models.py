"""`tinyvllm models`, and finding or downloading a model before an engine starts."""

from __future__ import annotations

from rich.markup import escape

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


def models() -> None:
    """List the models of the catalog and those downloaded."""
    from rich.table import Table

    from tinyvllm.storage.resolve import list_models, models_dir

    directory = models_dir()
    table = Table("MODEL", "SIZE", "DOWNLOADED", "DESCRIPTION", box=None, pad_edge=False)
    installed = {model.name: model for model in list_models(directory)}
    for name, entry in CATALOG.items():
        table.add_row(
            name, _megabytes(entry.num_bytes), "yes" if name in installed else "no", escape(entry.description)
        )
    for name, model in installed.items():
        if name not in CATALOG:
            table.add_row(escape(name), _megabytes(model.num_bytes), "yes", escape(str(model.path)))
    out.print(table, soft_wrap=False)
    out.print(f"\nModels are kept in {directory}. To download one: tinyvllm pull MODEL", highlight=False, markup=False)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
