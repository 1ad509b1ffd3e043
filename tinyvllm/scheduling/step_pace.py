"""How many tokens a step may have while sequences decode, so that none of them waits long for its next token.

A step with a chunk of a prompt takes longer than a plain step of decoding, and everything that decodes waits for it.
How much longer depends on the model, the device and the contexts, so it is measured while serving: a step may take at
most `stretch` times as long as a plain step. Steps in which nothing decodes are not limited. Where more requests wait
for their prompts than decode, the limit is as many times higher: after a burst of requests, those that began first
would delay all others to keep their own pace. (NVIDIA H200, a 1B model: of 256 requests at once, half had a first token
after 327 ms with the limit alone, and after 115 ms without any.)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

MOST_SAMPLES = 5  # of a size, the latest: their median ignores a step that something else delayed
MOST_AGE = 1000  # steps after which a size that was not run again is unknown: slow steps may have had another cause
FIRST_SIZE = 64  # tokens of a step while nothing is known about any size
LEAST_CHUNK = 8  # tokens by which a prompt advances however long they take


@dataclass
class _Times:
    """Seconds of the latest steps of a size."""

    latest: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_SAMPLES))
    number: int = 0  # of the last of them


class StepPace:
    """Owns the measured times of steps. Sizes are the token rows of a step's graph, its padding included."""

    def __init__(self, stretch: float) -> None:
        """stretch: above 1."""
        self.stretch = stretch
        self._plain: dict[int, _Times] = {}  # by rows: of the steps that only decode
        self._mixed: dict[int, _Times] = {}  # by rows: of the others
        self._num_steps = 0
        self._num_guesses = 0  # limits that were given while no plain step was measured

    def note(self, num_rows: int, is_decode: bool, seconds: float) -> None:
        """A step of `num_rows` rows took so long."""
        self._num_steps += 1
        times = (self._plain if is_decode else self._mixed).setdefault(num_rows, _Times())
        times.latest.append(seconds)
        times.number = self._num_steps

    def limit(self, num_decoding: int, budget: int, num_prompts: int = 1) -> int:
        """The tokens that a step may have, at most `budget`, if `num_decoding` of them are sequences that decode, and
        `num_prompts` others still have prompts to be computed.

        In the first burst after a start no step is plain until all its prompts are computed. So after a few steps of
        the first size, the time of the smallest one stands for a plain step's."""
        least = num_decoding + LEAST_CHUNK
        if not num_decoding or least >= budget:
            return budget
        plain_s = self._plain_s(num_decoding)
        known = self._known(least)
        if plain_s is None:
            self._num_guesses += 1
            if self._num_guesses > MOST_SAMPLES and known:
                plain_s = known[min(known)]
        if plain_s is None or not known:
            return min(budget, max(least, FIRST_SIZE))
        allowed_s = self.stretch * plain_s * max(1.0, num_prompts / num_decoding)
        return min(budget, max(least, self._largest(known, num_decoding, plain_s, allowed_s)))

    def _plain_s(self, num_decoding: int) -> float | None:
        """The time of a plain step of so many sequences. None: no plain step was measured yet.

        In a burst more sequences decode than ever before, and no step is plain. Then the smallest step that holds so
        many rows stands for it: it has some tokens of prompts among them, and takes little longer."""
        if not self._plain:
            return None
        holding = [rows for rows in self._plain if rows >= num_decoding]
        plain_s = median(self._plain[min(holding) if holding else max(self._plain)].latest)
        known = {} if holding else self._known(num_decoding)
        return max(plain_s, known[min(known)]) if known else plain_s

    def _largest(self, known: dict[int, float], num_decoding: int, plain_s: float, allowed_s: float) -> int:
        """The largest size that takes at most `allowed_s`, or 0. If none of the known ones is, but the smallest is
        known, that one: it costs no more than a part of it.

        Of the sizes that are not known, only twice the largest such one is considered, by assuming that a token more
        costs what it cost up to there."""
        known = {num_decoding: plain_s, **known}
        sizes = sorted(known)
        rows = max(size for size in sizes if known[size] <= allowed_s)
        if rows == num_decoding:
            return sizes[1] if sizes[1] < 2 * (num_decoding + LEAST_CHUNK) else 0
        if 2 * rows in known:
            return rows
        before = sizes[sizes.index(rows) - 1]
        per_row_s = (known[rows] - known[before]) / (rows - before)
        return 2 * rows if known[rows] + rows * max(0.0, per_row_s) <= allowed_s else rows

    def _known(self, least_rows: int) -> dict[int, float]:
        """The time of each size, from `least_rows` on, that was measured lately."""
        return {
            rows: median(times.latest)
            for rows, times in self._mixed.items()
            if rows >= least_rows and self._num_steps - times.number <= MOST_AGE
        }
