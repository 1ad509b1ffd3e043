"""How much a model's answers change with the format of its KV cache.

A text is scored token by token twice, with keys and values in float16 and in the format. Each token is predicted from
the text before it in its window, so that errors do not add up over an output, as they do when a model reads what it
wrote itself: this measures the format, not the luck of one continuation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from tinyvllm.bench.perplexity import Report, TokenScores, score_tokens
from tinyvllm.config import FLOAT16_KV, KVFormats
from tinyvllm.errors import TinyvllmError


@dataclass(frozen=True)
class KVQuality:
    """One format against float16."""

    formats: KVFormats
    num_tokens: int
    agreement: float  # the share of tokens in whose place both find the same id most likely
    mean_change: float  # of log p of the text's tokens
    mean_abs_change: float
    standard_error: float  # of mean_change
    perplexity: float

    def as_json(self) -> dict[str, Any]:
        return {
            "kv_cache_dtype": self.formats.name,
            "bytes_per_element": self.formats.bytes_per_element,
            "tokens": self.num_tokens,
            "top1_agreement": self.agreement,
            "mean_logprob_change": self.mean_change,
            "standard_error": self.standard_error,
            "mean_abs_logprob_change": self.mean_abs_change,
            "perplexity": self.perplexity,
        }


def parse_formats(names: Sequence[str]) -> list[KVFormats]:
    """Of names such as q8_0, or q8_0/q4_0 for keys and values apart. Raises TinyvllmError for one that is not known."""
    found = []
    for name in names:
        try:
            found.append(KVFormats.of(*name.split("/")))
        except (KeyError, TypeError):
            raise TinyvllmError(
                f"--formats has {name!r}: give names of --kv-cache-dtype, or two as KEYS/VALUES: q8_0/q4_0"
            ) from None
    return found


def measure_quality(
    model: str,
    windows: Sequence[Sequence[int]],
    formats: Sequence[KVFormats],
    report: Report,
    **settings: Any,
) -> list[KVQuality]:
    """Score the windows with float16 and with each format. `settings`: of EngineConfig."""
    before = _scores(model, windows, FLOAT16_KV, report, settings)
    return [compare_scores(one, before, _scores(model, windows, one, report, settings)) for one in formats]


def _scores(
    model: str, windows: Sequence[Sequence[int]], formats: KVFormats, report: Report, settings: dict[str, Any]
) -> TokenScores:
    own = {"kv_cache_dtype_k": formats.keys.name, "kv_cache_dtype_v": formats.values.name}
    return score_tokens(model, windows, report, formats.name, **(settings | own))


def compare_scores(formats: KVFormats, before: TokenScores, after: TokenScores) -> KVQuality:
    """What changed between two scorings of the same tokens."""
    change = before.losses - after.losses
    return KVQuality(
        formats=formats,
        num_tokens=len(change),
        agreement=float((before.likeliest == after.likeliest).mean()),
        mean_change=float(change.mean()),
        mean_abs_change=float(np.abs(change).mean()),
        standard_error=float(np.std(change, ddof=1) / math.sqrt(len(change))),
        perplexity=math.exp(after.losses.mean()),
    )


def quality_table(rows: Sequence[KVQuality]) -> Table:
    table = Table(
        *("KV CACHE", "BYTES", "TOKENS", "SAME TOP TOKEN", "LOG P", "±", "|LOG P|", "PERPLEXITY"),
        box=None,
        pad_edge=False,
    )
    for row in rows:
        table.add_row(
            row.formats.name,
            f"{row.formats.bytes_per_element / FLOAT16_KV.bytes_per_element:.0%}",
            str(row.num_tokens),
            f"{row.agreement:.2%}",
            f"{row.mean_change:+.5f}",
            f"{row.standard_error:.5f}",
            f"{row.mean_abs_change:.4f}",
            f"{row.perplexity:.3f}",
        )
    return table
