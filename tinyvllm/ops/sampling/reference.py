"""Sampling one row at a time in NumPy, by sorting: the specification of the kernels of sample.py and
logits_processing.py, and the reference of their tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinyvllm.config import MAX_LOGIT_BIAS, MAX_LOGPROBS
from tinyvllm.ops.sampling.logits_processing import IN_PROMPT, MAX_COUNT, WORD
from tinyvllm.ops.sampling.sample import OUT_LOGPROB, OUT_RANK, OUT_TOKEN, OUT_TOP, OUT_TOP_LOGPROB, OUT_WIDTH


@dataclass(frozen=True)
class HostState:
    """A sampling state (logits_processing.py) as NumPy arrays, one row per request."""

    counts: np.ndarray  # (S, at least V) uint16
    mask: np.ndarray  # (S, W) uint32
    bias: np.ndarray  # (S, 2 * MAX_LOGIT_BIAS) int32


def sample_row(
    logits: np.ndarray, views: dict[str, np.ndarray], row: int, state: HostState | None = None
) -> np.ndarray:
    """(OUT_WIDTH,) int32: the token of one sequence, and its logprobs if requested. logits (V,) float32. With a
    `state`, logits are processed and the token is counted in the state."""
    out = np.zeros(OUT_WIDTH, np.int32)
    floats = out.view(np.float32)
    suppressed_ids = views["suppressed_ids"][row]
    allowed = logits.astype(np.float64) if state is None else process_row(logits, views, row, state)
    allowed[suppressed_ids[(suppressed_ids >= 0) & (suppressed_ids < len(logits))]] = -np.inf
    temperature = views["temperature"].view(np.float32)[row]
    greedy = first_best(allowed)
    token, forced = greedy, int(views["forced"][row])
    if forced >= 0:
        token = min(forced, len(logits) - 1)
    elif temperature > 0 and greedy >= 0:
        weights = np.exp((allowed - allowed[greedy]) / temperature)
        kept = weights >= threshold(
            weights,
            min_p=views["min_p"].view(np.float32)[row],
            top_k=views["top_k"][row],
            top_p=views["top_p"].view(np.float32)[row],
        )
        if state is not None and views["state_rows"][row] >= 0:
            kept &= typical(np.where(kept, weights, 0.0), views["typical_p"].view(np.float32)[row])
        token = gumbel_max(np.where(kept, weights, 0.0), uniforms(views["seed"][row], views["draw"][row], len(logits)))
    out[OUT_TOKEN] = token
    if state is not None and token >= 0 and views["state_rows"][row] >= 0 and views["is_counted"][row]:
        count_token(state.counts[views["state_rows"][row]], token)
    count = min(int(views["num_logprobs"][row]), MAX_LOGPROBS)
    if count >= 0:
        logprobs = log_softmax(logits.astype(np.float64))  # of the raw logits: nothing suppressed, temperature 1
        ranked = np.argsort(-logprobs, kind="stable")
        likeliest = ranked[:count]
        floats[OUT_LOGPROB] = logprobs[max(token, 0)]
        out[OUT_RANK] = 1 + ranked.tolist().index(max(token, 0))
        out[OUT_TOP : OUT_TOP + count] = -1  # in case there are fewer ids than requested
        out[OUT_TOP : OUT_TOP + len(likeliest)] = likeliest
        floats[OUT_TOP_LOGPROB : OUT_TOP_LOGPROB + len(likeliest)] = logprobs[likeliest]
    return out


def process_row(logits: np.ndarray, views: dict[str, np.ndarray], row: int, state: HostState) -> np.ndarray:
    """(V,) float64: the logits that one sequence's token is drawn from, before ids are suppressed."""
    processed, state_row = logits.astype(np.float64), views["state_rows"][row]
    if state_row < 0:
        return processed
    entries = views["num_bias"][row]
    ids, values = np.split(state.bias[state_row], [MAX_LOGIT_BIAS])
    processed[ids[:entries]] += values.view(np.float32)[:entries]
    if views["is_counted"][row]:
        counts = state.counts[state_row][: len(logits)]
        repetition, frequency, presence = (
            views[f"{name}_penalty"].view(np.float32)[row] for name in ("repetition", "frequency", "presence")
        )
        times = (counts & MAX_COUNT).astype(np.float64)
        repeated = np.where(processed > 0, processed / repetition, processed * repetition)
        processed = np.where(counts > 0, repeated, processed) - frequency * times - presence * (times > 0)
    if views["is_masked"][row]:
        processed[~allowed_ids(state.mask[views["mask_rows"][row]], len(logits))] = -np.inf
    return processed


def allowed_ids(mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """(V,) bool: the bits of a mask's words."""
    return (mask[:, None] >> np.arange(WORD, dtype=np.uint32) & 1).astype(bool).reshape(-1)[:vocab_size]


def count_token(counts: np.ndarray, token: int) -> None:
    if counts[token] & MAX_COUNT < MAX_COUNT:
        counts[token] = (counts[token] & IN_PROMPT) | ((counts[token] & MAX_COUNT) + 1)


def typical(weights: np.ndarray, typical_p: float) -> np.ndarray:
    """(V,) bool: the ids that locally typical sampling keeps (Meister et al. 2022, sec. 4): those whose surprise is
    nearest to the entropy, until they hold typical_p of the mass; ties are all kept. A weight of 0 is filtered
    already."""
    kept = weights > 0
    if typical_p >= 1:
        return kept
    probabilities = weights[kept] / weights.sum()
    surprise = -np.log(probabilities)
    distances = np.full(len(weights), np.inf)
    distances[kept] = abs(surprise - (probabilities * surprise).sum())
    order = np.argsort(distances, kind="stable")
    mass = np.cumsum(weights[order]) / weights.sum()
    last = order[min(int(np.searchsorted(mass, typical_p)), len(order) - 1)]
    return distances <= distances[last]


def first_best(logits: np.ndarray) -> int:
    """The index of the largest logit, at a tie the lowest index; -1 if none is above -inf."""
    values = np.where(np.isnan(logits), -np.inf, logits)
    best = int(values.argmax())
    return best if values[best] > -np.inf else -1


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def threshold(weights: np.ndarray, *, min_p: float, top_k: int, top_p: float) -> float:
    """The smallest weight that min-p, then top-k, then top-p keep; ties at it are all kept. weights (V,), of which the
    largest is 1. min_p 0, top_k 0 and top_p 1 keep everything."""
    kept = np.sort(weights[weights >= min_p])[::-1]
    if 0 < top_k < len(kept):
        kept = kept[kept >= kept[top_k - 1]]
    if top_p < 1:
        mass = np.cumsum(kept)
        kept = kept[: np.searchsorted(mass, top_p * mass[-1]) + 1]
    return float(kept[-1])


def gumbel_max(weights: np.ndarray, uniform: np.ndarray) -> int:
    """Draw an index with probability weights / sum(weights), by the Gumbel-max trick: argmax(log w - log(-log u)), here
    without the outer logarithm (Devroye 1986, ch. 5)."""
    return int((weights / -np.log2(uniform)).argmax())


def uniforms(seed: int, draw: int, count: int) -> np.ndarray:
    """(count,) float64 in (0, 1): the uniform numbers of a request's `draw`-th token, 23 bits of a hash of each id."""
    golden = np.uint32(0x9E3779B9)
    seeds, draws = np.array([seed], np.int32).view(np.uint32), np.array([draw], np.int32).view(np.uint32)
    key = mix32(seeds + mix32(draws + golden))
    bits = mix32(np.arange(count, dtype=np.uint32) * golden + key)
    return ((bits >> 9) + 0.5) * 2.0**-23


def mix32(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's 32-bit finalizer on uint32, which wraps around."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
