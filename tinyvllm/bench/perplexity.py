"""How much a model loses by quantization: the perplexity of a text, before and after.

The text is chapters 20 to 22 of Jane Austen's Northanger Abbey (1818), which is in the public domain. Models have seen
it, so the perplexity itself says little; the difference between two versions of a model does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyvllm import LLM
from tinyvllm.config import ModelFiles, SamplingParams
from tinyvllm.errors import TinyvllmError
from tinyvllm.text.tokenizer import load_tokenizer

TEXT = Path(__file__).with_name("northanger_abbey.txt")
WINDOW = 512  # tokens that are scored with nothing before them: every token but a window's first
STEP = 64  # tokens computed at a time
MIN_BLOCK = 8  # tokens of the smallest block: a pool of blocks of any size holds a window
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Comparison:
    """The losses (-log p) of the same tokens under two models: (T,) float64 each."""

    before: np.ndarray
    after: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.before)

    @property
    def perplexities(self) -> tuple[float, float]:
        return math.exp(self.before.mean()), math.exp(self.after.mean())

    @property
    def difference(self) -> float:
        before, after = self.perplexities
        return after - before

    @property
    def standard_error(self) -> float:
        """Of the difference. The tokens are the same under both models, so their own spread cancels out: what counts is
        the spread of the losses' differences (the delta method takes it to the perplexity)."""
        spread = np.std(self.after - self.before, ddof=1) / math.sqrt(self.num_tokens)
        return float(self.perplexities[1] * spread)


def windows_of(
    files: ModelFiles,
    num_tokens: int,
    *,
    window: int = WINDOW,
    texts: Sequence[Path] = (TEXT,),
    flag: str = "--eval-tokens",
) -> list[list[int]]:
    """The texts' first tokens in windows, each with the tokens that the model's tokenizer puts first. Raises
    TinyvllmError, which names the `flag`, for a number that the texts do not have."""
    tokenizer = load_tokenizer(files)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in texts)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not 2 <= num_tokens <= len(ids):
        raise TinyvllmError(f"{flag} is {num_tokens}: give 2 to {len(ids)}, which the text has")
    first = [] if tokenizer.bos_id is None else tokenizer.encode("")[:1]
    step = window - len(first)
    starts = range(0, num_tokens - 1, step)  # a last window of one token would score none
    return [[*first, *ids[start : min(start + step, num_tokens)]] for start in starts]


@dataclass(frozen=True)
class TokenScores:
    """Of every token but the first of each window, in order: (T,) each."""

    losses: np.ndarray  # -log p, float64
    likeliest: np.ndarray  # the id that was most likely in its place


def losses(model: str, windows: Sequence[Sequence[int]], report: Report, stage: str, **settings: Any) -> np.ndarray:
    """-log p of every token but the first of each window, in order: (T,) float64. `settings`: of EngineConfig."""
    return score_tokens(model, windows, report, stage, **settings).losses


def score_tokens(
    model: str, windows: Sequence[Sequence[int]], report: Report, stage: str, **settings: Any
) -> TokenScores:
    """Score the tokens of windows by a model. `settings`: of EngineConfig."""
    report(stage, 0, len(windows))
    longest = max(map(len, windows))
    own: dict[str, Any] = {
        "max_model_len": longest + 2,
        # a step scores as many tokens as sequences may run, and one graph is enough
        "max_num_seqs": STEP,
        "max_num_batched_tokens": STEP,
        "decode_buckets": (STEP,),
        "token_buckets": (STEP,),
        "num_gpu_blocks_override": (longest + 2) // MIN_BLOCK + 2,
        "enable_prefix_caching": False,
    }
    llm = LLM(model, **settings | own)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    found: list[float] = []
    likeliest: list[int] = []
    try:
        for index, window in enumerate(windows):
            (output,) = llm.generate([{"prompt_token_ids": list(window)}], params, use_tqdm=False)
            assert output.prompt_logprobs is not None
            for token_id, scores in zip(window[1:], output.prompt_logprobs[1:], strict=True):
                assert scores is not None
                found.append(-scores[token_id].logprob)
                likeliest.append(max(scores, key=lambda each: scores[each].logprob))
            report(stage, index + 1, len(windows))
    finally:
        llm.close()
    return TokenScores(np.array(found), np.array(likeliest))
