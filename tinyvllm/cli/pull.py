"""`tinyvllm pull`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from tinyvllm.cli.models import download
from tinyvllm.cli.terminal import out
from tinyvllm.storage.catalog import DEFAULT_MODEL


def pull(
    *,
    name: Annotated[
        str, Argument(metavar="NAME", help="A catalog name (see `tinyvllm models`), or org/name on Hugging Face.")
    ] = DEFAULT_MODEL,
) -> None:
    """Download a model and verify it. An interrupted download leaves no partial model."""
    out.print(f"{name} is in {download(name).path}", highlight=False, markup=False)
