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


def windows_of(files: ModelFiles, num_tokens: int) -> list[list[int]]:
    """The text's first tokens in windows of WINDOW, each with the tokens that the model's tokenizer puts first. Raises
    TinyvllmError for a number that the text does not have."""
    tokenizer = load_tokenizer(files)
    text = TEXT.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not 2 <= num_tokens <= len(ids):
        raise TinyvllmError(f"--eval-tokens is {num_tokens}: give 2 to {len(ids)}, which the bundled text has")
    first = [] if tokenizer.bos_id is None else tokenizer.encode("")[:1]
    step = WINDOW - len(first)
    starts = range(0, num_tokens - 1, step)  # a last window of one token would score none
    return [[*first, *ids[start : min(start + step, num_tokens)]] for start in starts]


def losses(model: str, windows: Sequence[Sequence[int]], report: Report, stage: str, **settings: Any) -> np.ndarray:
    """-log p of every token but the first of each window, in order: (T,) float64. `settings`: of EngineConfig."""
    report(stage, 0, len(windows))
    own: dict[str, Any] = {
        "max_model_len": WINDOW + 2,
        # a step scores as many tokens as sequences may run, and one graph is enough
        "max_num_seqs": STEP,
        "max_num_batched_tokens": STEP,
        "decode_buckets": (STEP,),
        "token_buckets": (STEP,),
        "num_gpu_blocks_override": (WINDOW + 2) // MIN_BLOCK + 2,
        "enable_prefix_caching": False,
    }
    llm = LLM(model, **settings | own)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    found: list[float] = []
    try:
        for index, window in enumerate(windows):
            (output,) = llm.generate([{"prompt_token_ids": list(window)}], params, use_tqdm=False)
            assert output.prompt_logprobs is not None
            for token_id, scores in zip(window[1:], output.prompt_logprobs[1:], strict=True):
                assert scores is not None
                found.append(-scores[token_id].logprob)
            report(stage, index + 1, len(windows))
    finally:
        llm.close()
    return np.array(found)
